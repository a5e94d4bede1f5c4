"""The texts of what has been captured: which tokens each document has, from calls that each add some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from sniffer.errors import CaptureError
from sniffer.types import Document, Sections


@dataclass
class Text:
    """Tokens of a document, as they came. `first_position` is that of the first one, once there is one.

    `before` is the beginning of one that parts from another, as far as that is known: what the other had by then.
    """

    source_id: str
    before: Text | None = None
    first_position: int = 0
    tokens: list[Int32[np.ndarray, " n"]] = field(default_factory=list)
    sections: list[Sections | None] = field(default_factory=list)

    @property
    def token_ids(self) -> Int32[np.ndarray, " n_tokens"]:
        return np.concatenate([np.empty(0, np.int32), *self.tokens])

    @property
    def names(self) -> Sections | None:
        """Its sections; None where it has none."""
        return Sections.joined_if_any(zip(self.sections, map(len, self.tokens), strict=True))

    @property
    def whole(self) -> Text | None:
        """With its beginning; None where that is not known to the last token."""
        if self.before is None:
            return self if not self.first_position else None
        n = len(self.before.token_ids)
        if self.before.first_position or n != self.first_position:
            return None
        sections = [self.before.names, *self.sections]
        return Text(self.source_id, None, 0, [self.before.token_ids, *self.tokens], sections)

    def until(self, position: int) -> Text | None:
        """Its tokens before a position; None where its beginning is not known."""
        if (whole := self.whole) is None:
            return None
        names = whole.names
        cut = None if names is None else names.cut(0, position)
        return Text(self.source_id, None, 0, [whole.token_ids[:position]], [cut])


class Texts(dict[int, Text]):
    """By example id, in the order in which they began. `apart`: some have places that are not what RoPE turns by."""

    apart = False

    def add(self, document: Document, source_id: str) -> None:
        """What a call adds to a document, or begins it with."""
        text = self.setdefault(document.example_id, Text(source_id))
        if not document.n_tokens:
            return
        if not text.tokens:
            text.first_position = document.first_position
        text.tokens.append(document.token_ids.copy())
        text.sections.append(document.sections)

    def sections_until(self, number: int, position: int) -> Sections | None:
        """Those of a document's tokens before a position; None where they have none.

        Raises:
            CaptureError: not all of these tokens are known.
        """
        text = self.get(number, Text(""))
        text = text.whole or text
        known = text.first_position + len(text.token_ids)
        if known < position:
            raise CaptureError(
                f"document {number} goes on at position {position}, and of which section its tokens before are is not "
                "known any more: do not clear() while texts are gone on with, or leave attention_sections out"
            )
        pieces = [(None, text.first_position), (text.names, known - text.first_position)]
        found = Sections.joined_if_any(pieces)
        return None if found is None else found.cut(0, position)

    def part(self, number: int, source_id: str, parent: int, position: int) -> None:
        """A document parts from another one, whose tokens before a position are its own beginning."""
        before = self[parent].until(position) if parent in self else None
        self[number] = Text(source_id, before)

    def cut(self, ends: Mapping[int, int]) -> dict[int, int]:
        """Takes back what documents have from a position on, and returns how many tokens of each that were."""
        return {number: _cut(self[number], end) for number, end in ends.items() if number in self}


def _cut(text: Text, end: int) -> int:
    n = max(0, end - text.first_position)
    before, sections = text.token_ids, text.names
    tokens = before[:n]
    text.tokens = [tokens]
    text.sections = [None if sections is None else sections.cut(0, n)]
    return len(before) - len(tokens)
