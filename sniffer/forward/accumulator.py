"""The accumulator: captured rows in RAM, until they are written.

Vectors stay as they came, one (picks, heads * dim) tensor per batch and (layer, kind), in the model's own dtype. Where
they are from (`sniffer.types.Rows`) is kept once per pick, shared by all heads and by the kinds of one draw. A batch is
added whole or not at all; rows are let go of by (layer, kind), once they are safe on disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.forward.columns import Columns
from sniffer.forward.selection import Selection
from sniffer.types import Picks, Rows, TokenBatch, draw_of

NO_END = 1 << 62
"""Beyond any position."""

NOTHING: Mapping[tuple[int, str], Collection[int]] = {}


class Accumulator:
    """Holds what was captured, by (layer, kind).

    `rows` counts by kind all that was ever added, and not taken back; `nbytes` are the vectors held now.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.rows: dict[str, int] = dict.fromkeys(selection.kinds, 0)
        self._chunks: dict[tuple[int, str], list[tuple[Rows, Tensor]]] = defaultdict(list)
        self._nbytes: dict[tuple[int, str], int] = dict.fromkeys(selection.heads, 0)

    @property
    def nbytes(self) -> int:
        return sum(self._nbytes.values())

    def add(
        self,
        batch: TokenBatch,
        picks: Mapping[tuple[int, str], Picks],
        vectors: Mapping[tuple[int, str], Tensor],
        done: Mapping[tuple[int, str], Collection[int]] = NOTHING,
    ) -> None:
        """Takes one batch's picks by (layer, draw) and vectors (picks, heads * dim) by (layer, kind).

        `done` are example ids by (layer, kind) whose rows are on disk already, and are left out.

        Raises:
            CaptureError: some layer has shown nothing in this batch.
        """
        if silent := sorted({layer for layer, _ in self.selection.heads.keys() - vectors.keys()}):
            raise CaptureError(
                f"layers {silent} have shown nothing in a text of {batch.seq_len} tokens: their code does not come "
                "to its tap there; correct the local copy, or leave these layers out of capture.layers"
            )
        rows = {pair: Rows.of(batch, drawn) for pair, drawn in picks.items()}
        new = {pair: _without(done.get(pair, ()), rows[draw_of(pair)], chunk) for pair, chunk in vectors.items()}
        for (layer, kind), (here, chunk) in new.items():
            if len(chunk):
                self._chunks[layer, kind].append((here, chunk))
                self.rows[kind] += len(chunk) * len(self.selection.heads[layer, kind])
                self._nbytes[layer, kind] += chunk.nbytes

    def cut(self, ends: Mapping[int, int]) -> None:
        """Lets go of the last rows of some documents: those from a position on, by example id.

        A document's rows came in the order of their positions.
        """
        for (layer, kind), chunks in self._chunks.items():
            waiting = set(ends)
            for number in reversed(range(len(chunks))):
                rows, chunk = chunks[number]
                limits = np.array([ends.get(one, NO_END) for one in rows.example_id.tolist()])
                left = rows.position < limits
                waiting -= set(rows.example_id[left].tolist())
                if not left.all():
                    chunks[number] = rows[left], chunk[torch.from_numpy(left)]
                    gone = len(chunk) - int(left.sum())
                    self.rows[kind] -= gone * len(self.selection.heads[layer, kind])
                    self._nbytes[layer, kind] -= gone * chunk[0].nbytes
                if not waiting:
                    break
            chunks[:] = [one for one in chunks if len(one[0])]

    def by_size(self) -> list[tuple[int, str]]:
        """The (layer, kind) pairs that hold something, the largest first."""
        return sorted((pair for pair, held in self._nbytes.items() if held), key=lambda pair: -self._nbytes[pair])

    def held(self, layer: int, kind: str) -> int:
        """Bytes of vectors held for one (layer, kind)."""
        return self._nbytes[layer, kind]

    def columns(self, layer: int, kind: str, dim: int) -> Columns:
        """The rows of one (layer, kind), which stay here until they are released."""
        chunks = self._chunks[layer, kind]
        rows = Rows.joined([here for here, _ in chunks])
        return Columns(self.selection.heads[layer, kind], [chunk for _, chunk in chunks], rows, dim)

    def release(self, layer: int, kind: str) -> None:
        """Lets go of the rows of one (layer, kind)."""
        self._chunks.pop((layer, kind), None)
        self._nbytes[layer, kind] = 0

    def set_aside(self, pairs: Collection[tuple[int, str]]) -> Accumulator:
        """The rows of some (layer, kind), which leave this one: to be written while rows are added here."""
        aside = Accumulator(self.selection)
        for pair in pairs:
            aside._chunks[pair], aside._nbytes[pair] = self._chunks[pair], self._nbytes[pair]
            self.release(*pair)
        return aside

    def take_back(self, aside: Accumulator) -> None:
        """Rows that were set aside, and are there still."""
        for pair in aside.by_size():
            self._chunks[pair] = aside._chunks[pair] + self._chunks[pair]
            self._nbytes[pair] += aside._nbytes[pair]
            aside.release(*pair)


def _without(done: Collection[int], rows: Rows, chunk: Tensor) -> tuple[Rows, Tensor]:
    """Leaves out the rows of some documents."""
    if not done:
        return rows, chunk
    wanted = ~np.isin(rows.example_id, np.fromiter(done, dtype=np.int64))
    return rows[wanted], chunk[torch.from_numpy(wanted)]
