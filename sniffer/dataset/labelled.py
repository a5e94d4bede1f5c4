"""Rows that say what their sections are: several columns, spans of a text, labels of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from sniffer.dataset.spans import Span, check_name, checked_spans
from sniffer.errors import DatasetError
from sniffer.types import NONE, Names, SectionedText, SectionedTokens, Sections

KEYS = ("start", "end", "label")


def joined(texts: Mapping[str, str], separator: str) -> SectionedText:
    """Columns one after the other, each a section of its name; separators belong to none."""
    spans, begin = [], 0
    for name, text in texts.items():
        if text:
            spans.append((begin, begin + len(text), name))
        begin += len(text) + len(separator)
    return SectionedText(separator.join(texts.values()), tuple(spans))


def spanned(text: str, value: Any, place: str) -> SectionedText:
    """A text with the spans of its row.

    Raises:
        DatasetError: they are no list of {start, end, label}, or not of this text.
    """
    if not isinstance(value, list | None):
        raise DatasetError(f"{place} has a {type(value).__name__} where its spans should be: wanted a list")
    return SectionedText(text, checked_spans([_span(one, place) for one in value or ()], len(text), place))


def _span(value: Any, place: str) -> Span:
    known: list[Any] = [value.get(key) for key in KEYS] if isinstance(value, Mapping) else [None]
    if any(isinstance(bound, bool) or not isinstance(bound, int) for bound in known[:2]):
        raise DatasetError(f"{place} has {value!r:.80} among its spans: wanted start, end (characters) and label")
    return known[0], known[1], known[2]


def labelled(ids: Int32[np.ndarray, " n_tokens"], value: Any, place: str) -> SectionedTokens:
    """Token ids with the labels of their row: texts or integers, null for none.

    Raises:
        DatasetError: they are no list of them, or not as many as token ids.
    """
    if not isinstance(value, list | np.ndarray) or len(value) != len(ids):
        found = f"{len(value):,} labels" if isinstance(value, list | np.ndarray) else f"a {type(value).__name__}"
        raise DatasetError(f"{place} has {found} for its {len(ids):,} token ids: wanted a list, one for each")
    names = [_label(one, place) for one in value]
    known = {name: code for code, name in enumerate(dict.fromkeys(names))}
    codes = np.array([known[name] for name in names], dtype=np.int32)
    return SectionedTokens(ids, Sections.of(Names.of(list(known), codes)))


def _label(value: Any, place: str) -> str:
    if value is None or value == NONE:
        return NONE
    name = str(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else value
    check_name(name, place)
    return str(name)
