"""Which characters of a rendered chat are of which message: told by the template itself.

A chat is rendered a second time with marks around what its messages say, characters of a private plane that no text
of it has. Where this gives the same text but for the marks, what lies between two of them is what the template made
of that message, and all else it wrote itself. A template may look into a message, or take blanks off its ends: then
each text is marked alone, within its blanks, or between its tags,

    "<think>\\nhm\\n</think>\\n\\nyes"  as  "<think>\\n(hm)\\n</think>\\n\\n(yes)"

until the rendering is the same. A text that cannot be followed so is refused, unless the rendering does not depend on
it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sniffer.dataset.spans import Span, check_name
from sniffer.errors import DatasetError
from sniffer.types import Chat

TEMPLATE = "template"
"""The section of what a template writes itself."""

NO_TEXT = ("role", "type", "id", "tool_call_id")
"""Keys of a message whose values a template compares."""

TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""What templates look for in a text, such as </think>."""

FIRST_MARK, LAST_MARK = 0xF0000, 0x10FFFD
"""Of the private planes."""

Render = Callable[[Chat], str]
Place = tuple[int | str, ...]
"""Where in a chat's messages a text is: the message's number, then keys and numbers."""


@dataclass(frozen=True)
class Said:
    """A text of a message: where it is, and its stretches, which follow one another, with their labels."""

    place: Place
    text: str
    stretches: tuple[Span, ...]


WITHOUT_ROLES = "dataset.chat.sections=false captures chats without sections"
UNTOLD = "which tokens are of which role cannot be told"


def spans_of(chat: Chat, render: Render, name: str, instead: str = WITHOUT_ROLES) -> tuple[str, tuple[Span, ...]]:
    """A rendered chat, and the spans of what its messages say, by their roles or as `chat.spans` has them.

    Args:
        instead: what can be done where they cannot be told, for messages.

    Raises:
        DatasetError: it cannot be told what the template has made of a text.
        Exception: what the template raises.
    """
    plain = render(replace(chat, spans=None))
    said = list(_said(chat, name))
    advice = f"{UNTOLD}; {instead}"
    if any(MARK.search(text) for text in (plain, *(one.text for one in said))):
        raise DatasetError(f"document {name!r} has characters of the private planes 15 or 16: {advice}")
    every = _followed(chat, render, plain, [(one, one.stretches) for one in said])
    alone = (span for one in said for span in _alone(chat, render, plain, one, name, advice))
    found = sorted(alone if every is None else (span for spans in every for span in spans))
    for (_, end, _), (start, _, _) in pairwise(found):
        if start < end:
            raise DatasetError(f"document {name!r}: its template weaves messages into each other: {advice}")
    return plain, tuple(found)


def _said(chat: Chat, name: str) -> Iterator[Said]:
    """Every text of every message that is more than nothing."""
    for number, message in enumerate(chat.messages):
        role: Any = message.get("role")
        check_name(role, f"document {name!r}")
        if role == TEMPLATE:
            raise DatasetError(
                f"document {name!r} has the role {TEMPLATE!r}, the section of what a template writes itself"
            )
        inner = () if chat.spans is None else chat.spans[number]
        for place, text in _texts(message, (number,)):
            spans = inner if place == (number, "content") else ()
            yield Said(place, text, tuple(_covering(spans, len(text), role)))


def _texts(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str) and value:
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in NO_TEXT and not (key == "name" and len(place) == 1):
                yield from _texts(inner, (*place, key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _texts(inner, (*place, number))


def _covering(spans: Sequence[Span], length: int, role: str) -> Iterator[Span]:
    """Spans of a text, and what lies between them as the role's."""
    begin = 0
    for start, end, name in [*spans, (length, length, role)]:
        if begin < start:
            yield begin, start, role
        if start < end:
            yield start, end, name
        begin = end


def _alone(chat: Chat, render: Render, plain: str, said: Said, name: str, advice: str) -> Iterator[Span]:
    """The spans of one text, however it has to be marked."""
    for part in _ways(said.text):
        found = _followed(chat, render, plain, [(said, tuple(_within(said.stretches, [part])))])
        if found is not None:
            yield from (span for spans in found for span in spans)
            return
    stretches = list(_within(said.stretches, list(_between_tags(said.text))))
    apart = [_followed(chat, render, plain, [(said, (stretch,))]) for stretch in stretches]
    if not stretches and said.text.strip() or any(found is None for found in apart):
        where = ".".join(map(str, said.place[1:]))
        raise DatasetError(
            f"document {name!r}: what the chat template makes of the {where} of message {said.place[0]} "
            f"({said.text!r:.40}) cannot be followed: {advice}"
        )
    yield from _with_tags(stretches, [spans for found in apart if found for spans in found], said.text, plain)


def _ways(text: str) -> Iterator[tuple[int, int]]:
    """From where to where a text may be marked: all of it, or without blanks at one end, or both."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    yield from dict.fromkeys([(0, len(text)), (0, last), (first, len(text)), (first, last)] if first < last else ())


def _between_tags(text: str) -> Iterator[tuple[int, int]]:
    """What lies between tags, without the blanks at its ends."""
    bounds = [0, *(bound for tag in TAG.finditer(text) for bound in tag.span()), len(text)]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        inner = text[start:end]
        yield start + len(inner) - len(inner.lstrip()), start + len(inner.rstrip())


def _within(stretches: Sequence[Span], parts: Sequence[tuple[int, int]]) -> Iterator[Span]:
    """As much of some stretches as lies in some parts."""
    for first, last in parts:
        for start, end, label in stretches:
            if max(start, first) < min(end, last):
                yield max(start, first), min(end, last), label


def _with_tags(stretches: Sequence[Span], found: Sequence[list[Span]], text: str, plain: str) -> Iterator[Span]:
    """Where stretches are, and between two of them tags and blanks, if the template has left these alone."""
    yield from (span for spans in found for span in spans)
    for (one, other), (before, after) in zip(pairwise(stretches), pairwise(found), strict=True):
        if len(before) == len(after) == 1:
            start, end = before[0][1], after[0][0]
            if start < end and plain[start:end] == text[one[1] : other[0]]:
                yield start, end, one[2]


Marked = Sequence[tuple[Said, Sequence[Span]]]
"""Texts, and which stretches of each are marked."""


def _followed(chat: Chat, render: Render, plain: str, marked: Marked) -> list[list[Span]] | None:
    """Where each of these stretches is in the rendered chat; None where that cannot be told.

    One that is nowhere must have no say in the rendering: another text in its place changes nothing.
    """
    labels = [label for _, stretches in marked for *_, label in stretches]
    if FIRST_MARK + 2 * len(labels) > LAST_MARK:
        return None
    rendered = _rendered(chat, render, _with_marks(marked))
    if rendered is None or MARK.sub("", rendered) != plain:
        return None
    found = _between_marks(rendered, labels)
    if found is None:
        return None
    nowhere = {number for number, spans in enumerate(found) if not spans}
    if nowhere and _rendered(chat, render, _with_marks(marked, nowhere)) != plain:
        return None
    return found


MARK = re.compile(f"[{chr(FIRST_MARK)}-{chr(LAST_MARK)}]")


def _with_marks(marked: Marked, replaced: Collection[int] | None = None) -> dict[Place, str]:
    """Texts with their stretches in marks, which are numbered; or with some `replaced` by a mark, the others as is."""
    texts, number = {}, 0
    for said, stretches in marked:
        pieces, begin = [], 0
        for start, end, _ in stretches:
            opens, closes = chr(FIRST_MARK + 2 * number), chr(FIRST_MARK + 2 * number + 1)
            inner = said.text[start:end]
            shown = f"{opens}{inner}{closes}" if replaced is None else opens if number in replaced else inner
            pieces += [said.text[begin:start], shown]
            begin, number = end, number + 1
        texts[said.place] = "".join([*pieces, said.text[begin:]])
    return texts


def _between_marks(rendered: str, labels: Sequence[str]) -> list[list[Span]] | None:
    """The spans that the marks of each number enclose, counted without marks; None where one lacks its other."""
    spans: list[list[Span]] = [[] for _ in labels]
    opened: tuple[int, int] | None = None
    for before, mark in enumerate(MARK.finditer(rendered)):
        number, closes = divmod(ord(mark.group()) - FIRST_MARK, 2)
        at = mark.start() - before
        if not closes and opened is None:
            opened = number, at
        elif closes and opened is not None and opened[0] == number and opened[1] < at:
            spans[number].append((opened[1], at, labels[number]))
            opened = None
        else:
            return None
    return spans if opened is None else None


def _rendered(chat: Chat, render: Render, texts: Mapping[Place, str]) -> str | None:
    """The chat with other texts; None where the template refuses them."""
    messages = tuple(_replaced(message, (number,), texts) for number, message in enumerate(chat.messages))
    try:
        return render(replace(chat, messages=messages, spans=None))
    except Exception:  # of a template: any
        return None


def _replaced(value: Any, place: Place, texts: Mapping[Place, str]) -> Any:
    if isinstance(value, str):
        return texts.get(place, value)
    if isinstance(value, Mapping):
        return {key: _replaced(inner, (*place, key), texts) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(inner, (*place, number), texts) for number, inner in enumerate(value)]
    return value
