"""From spans of a text, in characters, to sections of its tokens.

Which characters a token stands for, its tokenizer says. A token belongs to a span if it has one of its characters, the
pieces of a character that several tokens make up included; one that reaches into two spans belongs to the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from sniffer.errors import DatasetError
from sniffer.types import NONE, Names, Sections
from sniffer.types.sections import LONGEST_NAME

Span = tuple[int, int, str]
"""The first character, the one after the last, and a name."""


def checked_spans(spans: Iterable[Span], n_characters: int, place: str) -> tuple[Span, ...]:
    """Spans in order.

    Raises:
        DatasetError: naming the first that is empty, unnamed, outside its text, or overlaps another.
    """
    ordered = sorted(spans)
    for start, end, name in ordered:
        check_name(name, place)
        if not 0 <= start < end <= n_characters:
            found = "is empty" if start == end else f"lies outside a text of {n_characters:,} characters"
            raise DatasetError(f"{place}: the span {start}-{end} {name!r:.60} {found}: mend it, or leave it out")
    for (_, end, name), (start, _, other) in zip(ordered, ordered[1:], strict=False):
        if start < end:
            raise DatasetError(
                f"{place}: the spans {name!r:.60}, up to {end}, and {other!r:.60}, from {start}, overlap: a token "
                "belongs to one section"
            )
    return tuple(ordered)


def check_name(name: object, place: str) -> None:
    """Raises DatasetError for what cannot name a section."""
    if not isinstance(name, str) or name == NONE:
        found = "nothing" if name in (None, NONE) else f"{name!r:.60}"
        raise DatasetError(f"{place} has {found} where the name of a section should be: wanted a text")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise DatasetError(f"{place}: the name of a section has half a character: {name!r:.60}") from error
    if size > LONGEST_NAME:
        raise DatasetError(f"{place}: the name of a section has {size:,} bytes, more than {LONGEST_NAME:,}: shorten it")


def sections_of(
    starts: Int[np.ndarray, " n_tokens"],
    ends: Int[np.ndarray, " n_tokens"],
    spans: Sequence[Span],
    text: str,
    place: str,
) -> Sections:
    """The sections of a text's tokens.

    Args:
        starts, ends: the first character of each token, and the one after its last; equal where it stands for none.
        spans: as `checked_spans` gives them.

    Raises:
        DatasetError: the tokens do not follow their text, or a span that is more than blanks has none.
    """
    some = ends > starts
    if (np.diff(starts[some]) < 0).any() or (np.diff(ends[some]) < 0).any() or (ends > len(text)).any():
        raise DatasetError(
            f"{place}: its tokenizer does not say in order which characters tokens stand for: take another"
        )
    firsts, lasts = (np.array([span[at] for span in spans], dtype=np.int64) for at in (0, 1))
    # The first span that ends behind the token's first character, if it begins before the token's end.
    which = np.searchsorted(lasts, starts, side="right")
    inside = some & (which < len(spans))
    inside[inside] = firsts[which[inside]] < ends[inside]
    found = np.where(inside, which, len(spans))
    for number in sorted(set(range(len(spans))) - set(found.tolist())):
        start, end, name = spans[number]
        if text[start:end].strip() and not (some & (starts < end) & (ends > start)).any():
            raise DatasetError(f"{place}: the tokenizer makes no token of the span {start}-{end} {name!r:.60}")
    return Sections.of(Names.of([*(name for *_, name in spans), NONE], found))
