"""Draws of steps to come: a text that is written token by token asks for one position at a time.

The law belongs to positions, so a stretch of them is drawn at once for all layers, and each step looks its own up.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool

from sniffer.forward.observer import draw
from sniffer.forward.selection import Selection
from sniffer.sampler import Picker
from sniffer.types import Document, Picks, TokenBatch

STRETCH = 64
"""Positions that are drawn at a time."""

REMEMBERED = 1 << 10
"""Documents whose next positions are held; a step has fewer."""

NO_PICKS = Picks(*(np.empty(0, dtype=np.int32) for _ in range(3)))


class Ahead:
    """The draws of one picker, for a selection; those of single tokens are made ahead."""

    def __init__(self, picker: Picker, selection: Selection) -> None:
        self._picker = picker
        self._selection = selection
        self._drawn: dict[int, tuple[int, Bool[np.ndarray, "draws positions"]]] = {}

    def draw(self, batch: TokenBatch) -> Mapping[tuple[int, str], Picks]:
        """The picks of a batch, by (layer, draw)."""
        if max(document.n_tokens for document in batch.documents) > 1:
            return draw(self._picker, self._selection, batch)
        kept = np.stack([self._kept(document) for document in batch.documents], axis=1)
        picks = dict.fromkeys(self._selection.draws, NO_PICKS)
        if kept.any():
            positions = np.array([document.first_position for document in batch.documents], dtype=np.int32)
            for number in np.flatnonzero(kept.any(axis=1)).tolist():
                pair = self._selection.draws[number]
                rows = np.flatnonzero(kept[number]).astype(np.int32)
                at = positions[rows]
                buckets = self._picker.side(pair[1]).buckets_until(int(at.max()) + 1)[at]
                picks[pair] = Picks(rows, at, buckets)
        return picks

    def _kept(self, document: Document) -> Bool[np.ndarray, " draws"]:
        """Which draws keep the one token of a document; none where it has none."""
        if not document.n_tokens:
            return np.zeros(len(self._selection.draws), dtype=bool)
        first, kept = self._drawn.get(document.example_id, (0, np.empty((0, 0), dtype=bool)))
        if not first <= document.first_position < first + kept.shape[1]:
            first = document.first_position
            kept = self._stretch(document.example_id, first)
            if len(self._drawn) >= REMEMBERED:
                self._drawn.clear()
            self._drawn[document.example_id] = first, kept
        column: Bool[np.ndarray, " draws"] = kept[:, document.first_position - first]
        return column

    def _stretch(self, number: int, first: int) -> Bool[np.ndarray, "draws positions"]:
        text = Document(number, str(number), np.zeros(STRETCH, dtype=np.int32), False, first_position=first)
        kept = np.zeros((len(self._selection.draws), STRETCH), dtype=bool)
        for row, (layer, side) in enumerate(self._selection.draws):
            kept[row, self._picker.positions(text, layer, side) - first] = True
        return kept
