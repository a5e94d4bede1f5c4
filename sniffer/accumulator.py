"""The accumulator: captured rows in RAM, until they are written.

Vectors stay as they came, one (picks, heads * dim) tensor per batch and (layer, kind), in the model's own
dtype. Positions, buckets, token ids and example ids are kept once per (layer, draw), shared by all
heads and by the kinds of one draw. A batch is added whole or not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from sniffer.schema import Columns
from sniffer.selection import Selection
from sniffer.types import DRAW_OF_KIND, Picks, TokenBatch


class Accumulator:
    """Holds what was captured, by (layer, kind)."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.rows: dict[str, int] = dict.fromkeys(selection.kinds, 0)
        self.nbytes = 0
        self._vectors: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self._positions: dict[tuple[int, str], list[_Positions]] = defaultdict(list)

    def add(
        self,
        batch: TokenBatch,
        picks: Mapping[tuple[int, str], Picks],
        vectors: Mapping[tuple[int, str], Tensor],
    ) -> None:
        """Takes one batch's picks by (layer, draw) and vectors (picks, heads * dim) by (layer, kind)."""
        assert vectors.keys() == self.selection.heads.keys(), "a layer was not seen"
        for pair, drawn in picks.items():
            if len(drawn):
                self._positions[pair].append(_Positions.of(batch, drawn))
        for (layer, kind), chunk in vectors.items():
            if len(chunk):
                self._vectors[layer, kind].append(chunk)
                self.rows[kind] += len(chunk) * len(self.selection.heads[layer, kind])
                self.nbytes += chunk.nbytes

    def take(self, layer: int, kind: str, dim: int) -> Columns:
        """Hands over the rows of one (layer, kind) and lets go of its vectors."""
        chunks = self._vectors.pop((layer, kind), [])
        self.nbytes -= sum(chunk.nbytes for chunk in chunks)
        positions = _Positions.joined(self._positions[layer, DRAW_OF_KIND[kind]])
        return Columns(
            heads=self.selection.heads[layer, kind],
            vectors=chunks,
            buckets=positions.buckets,
            positions=positions.positions,
            token_ids=positions.token_ids,
            example_ids=positions.example_ids,
            dim=dim,
        )


class _Positions:
    """Where rows come from: parallel arrays, one entry per pick."""

    def __init__(
        self, buckets: np.ndarray, positions: np.ndarray, token_ids: np.ndarray, example_ids: np.ndarray
    ) -> None:
        self.buckets = buckets
        self.positions = positions
        self.token_ids = token_ids
        self.example_ids = example_ids

    @classmethod
    def of(cls, batch: TokenBatch, picks: Picks) -> _Positions:
        starts = np.cumsum([0] + [document.n_tokens for document in batch.documents[:-1]])
        tokens = np.concatenate([document.token_ids for document in batch.documents])
        examples = np.array([document.example_id for document in batch.documents], dtype=np.int64)
        return cls(
            picks.buckets,
            picks.positions,
            tokens[starts[picks.rows] + picks.positions].astype(np.int32),
            examples[picks.rows],
        )

    @classmethod
    def joined(cls, parts: list[_Positions]) -> _Positions:
        def join(name: str, dtype: type) -> np.ndarray:
            return np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)])

        return cls(
            join("buckets", np.int32),
            join("positions", np.int32),
            join("token_ids", np.int32),
            join("example_ids", np.int64),
        )
