"""Hay: the texts of any dataset as one ring of words, from which stretches are cut, and places between their sentences.

Words are what blanks separate. No stretch has a word of the ring twice: hay that is too short is refused, since text
that comes again is attended to as nothing else is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64

from sniffer.errors import DatasetError
from sniffer.types import Content, SectionedText

WORD = re.compile(r"\S+")
SENTENCE_END = re.compile(r"[.!?。！？][\"'”’»)\]]*(?=\s|$)|\S(?=[^\S\n]*\n\s*\n)")
"""The last character of a sentence, or of a paragraph."""

SEPARATOR = "\n\n"
NEAREST = 100
"""Words within which a stretch looks for the beginning of a sentence."""

TOLERANCE = 20
"""A needle goes to the end of a sentence that is at most so great a part of the hay away, one in 20."""


class Haystack:
    """The texts of a dataset, one after the other, the first again after the last."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._text = SEPARATOR.join(stripped for text in texts if (stripped := text.strip()))
        self._starts, self._ends = word_bounds(self._text)
        self._beginnings = np.concatenate([np.zeros(1, np.int64), self._words_before(sentence_ends(self._text))[:-1]])

    def __len__(self) -> int:
        """Words."""
        return len(self._starts)

    def stretch(self, drawn: int, n_words: int) -> str:
        """So many words, from a sentence's beginning behind a drawn word, or from that word where none is near."""
        assert 0 < n_words <= len(self), "a stretch longer than the hay"
        word = drawn % len(self)
        place = int(np.searchsorted(self._beginnings, word))
        if place < len(self._beginnings) and self._beginnings[place] - word <= NEAREST:
            word = int(self._beginnings[place])
        end = word + n_words
        if end <= len(self):
            return self._text[self._starts[word] : self._ends[end - 1]]
        rest = self._text[: self._ends[end - len(self) - 1]]
        return f"{self._text[self._starts[word] :]}{SEPARATOR}{rest}"

    def _words_before(self, ends: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        found: Int64[np.ndarray, " n"] = np.searchsorted(self._ends, ends, side="right")
        return found


def texts_of(dataset: Any, title: str) -> Iterator[str]:
    """The texts of a dataset.

    Raises:
        DatasetError: it has something else.
    """
    for _, source_id, content in dataset.texts():
        yield _text_of(content, f"document {str(source_id)!r} of {title}")


def _text_of(content: Content, place: str) -> str:
    text = content.text if isinstance(content, SectionedText) else content
    if not isinstance(text, str):
        raise DatasetError(f"{place} is no text: hay is made of texts, not of chats or token ids")
    return text


def word_bounds(text: str) -> tuple[Int64[np.ndarray, " words"], Int64[np.ndarray, " words"]]:
    """The first character of each word, and the one after its last."""
    spans = np.array([found.span() for found in WORD.finditer(text)], dtype=np.int64).reshape(-1, 2)
    return spans[:, 0].copy(), spans[:, 1].copy()


def sentence_ends(text: str) -> Int64[np.ndarray, " sentences"]:
    """The characters before which a sentence or a paragraph has ended, that of the whole text among them."""
    found = {match.end() for match in SENTENCE_END.finditer(text)} | {len(text)}
    return np.array(sorted(found), dtype=np.int64)


def places(hay: str) -> tuple[Int64[np.ndarray, " words"], Int64[np.ndarray, " places"]]:
    """Of a stretch, the character after each word, and before which of its words a sentence begins; the end counts."""
    ends = word_bounds(hay)[1]
    before = np.searchsorted(ends, sentence_ends(hay), side="right")
    return ends, np.unique(np.concatenate([np.zeros(1, np.int64), before])).astype(np.int64)


def place_at(depth: float, n_words: int, between: Int64[np.ndarray, " places"]) -> int:
    """How many words of the hay come before a needle at this depth, from 0 to 1.

    The nearest place between two sentences, or where that is further than a twentieth of the hay, the very word.
    """
    wanted = depth * n_words
    nearest = int(between[np.argmin(np.abs(between - wanted))])
    return nearest if abs(nearest - wanted) * TOLERANCE <= n_words else round(wanted)
