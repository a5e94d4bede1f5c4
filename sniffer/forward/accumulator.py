"""The accumulator: captured rows in RAM, until they are written.

Vectors stay as they came, one (picks, heads * dim) tensor per batch and (layer, kind), in the model's own
dtype. Positions, buckets, token ids and example ids are kept once per pick, shared by all heads and by the
kinds of one draw. A batch is added whole or not at all; rows are let go of by (layer, kind), once they are
safe on disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.forward.rows import Columns
from sniffer.forward.selection import Selection
from sniffer.types import DRAW_OF_KIND, Picks, TokenBatch

NOTHING: Mapping[tuple[int, str], Collection[int]] = {}


class Accumulator:
    """Holds what was captured, by (layer, kind).

    `rows` counts by kind all that was ever added; `nbytes` are the vectors held now.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.rows: dict[str, int] = dict.fromkeys(selection.kinds, 0)
        self._chunks: dict[tuple[int, str], list[tuple[_Places, Tensor]]] = defaultdict(list)
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
        places = {pair: _Places.of(batch, drawn) for pair, drawn in picks.items()}
        new = {pair: _without(done.get(pair, ()), places[_draw_of(pair)], chunk) for pair, chunk in vectors.items()}
        for (layer, kind), (here, chunk) in new.items():
            if len(chunk):
                self._chunks[layer, kind].append((here, chunk))
                self.rows[kind] += len(chunk) * len(self.selection.heads[layer, kind])
                self._nbytes[layer, kind] += chunk.nbytes

    def by_size(self) -> list[tuple[int, str]]:
        """The (layer, kind) pairs that hold something, the largest first."""
        return sorted((pair for pair, held in self._nbytes.items() if held), key=lambda pair: -self._nbytes[pair])

    def held(self, layer: int, kind: str) -> int:
        """Bytes of vectors held for one (layer, kind)."""
        return self._nbytes[layer, kind]

    def columns(self, layer: int, kind: str, dim: int) -> Columns:
        """The rows of one (layer, kind), which stay here until they are released."""
        places = _Places.joined([here for here, _ in self._chunks[layer, kind]])
        return Columns(
            heads=self.selection.heads[layer, kind],
            vectors=[chunk for _, chunk in self._chunks[layer, kind]],
            buckets=places.buckets,
            positions=places.positions,
            token_ids=places.token_ids,
            example_ids=places.example_ids,
            dim=dim,
        )

    def release(self, layer: int, kind: str) -> None:
        """Lets go of the rows of one (layer, kind)."""
        self._chunks.pop((layer, kind), None)
        self._nbytes[layer, kind] = 0


def _draw_of(pair: tuple[int, str]) -> tuple[int, str]:
    return pair[0], DRAW_OF_KIND[pair[1]]


def _without(done: Collection[int], places: _Places, chunk: Tensor) -> tuple[_Places, Tensor]:
    """Leaves out the rows of some documents."""
    if not done:
        return places, chunk
    wanted = ~np.isin(places.example_ids, np.fromiter(done, dtype=np.int64))
    return places.where(wanted), chunk[torch.from_numpy(wanted)]


class _Places:
    """Where rows come from: parallel arrays, one entry per pick."""

    def __init__(
        self, buckets: np.ndarray, positions: np.ndarray, token_ids: np.ndarray, example_ids: np.ndarray
    ) -> None:
        self.buckets = buckets
        self.positions = positions
        self.token_ids = token_ids
        self.example_ids = example_ids

    def where(self, wanted: Bool[np.ndarray, " picks"]) -> _Places:
        return _Places(self.buckets[wanted], self.positions[wanted], self.token_ids[wanted], self.example_ids[wanted])

    @classmethod
    def of(cls, batch: TokenBatch, picks: Picks) -> _Places:
        examples = np.array([document.example_id for document in batch.documents], dtype=np.int64)
        return cls(
            picks.buckets,
            picks.positions,
            batch.tokens(picks),
            examples[picks.rows],
        )

    @classmethod
    def joined(cls, parts: list[_Places]) -> _Places:
        def join(name: str, dtype: type) -> np.ndarray:
            return np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)])

        return cls(
            join("buckets", np.int32),
            join("positions", np.int32),
            join("token_ids", np.int32),
            join("example_ids", np.int64),
        )
