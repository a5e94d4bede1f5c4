"""Captured rows of one (layer, kind), heads side by side, still in the model's own dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32, Int64

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Columns:
    """All captured rows of one (layer, kind), heads side by side.

    `heads` are the model's numbers of the active heads, ascending. `vectors` are chunks of shape
    (rows, heads * dim) on the CPU, contiguous, in the model's dtype, a row's first head first; the other
    columns run over the chunks' rows in order.
    """

    heads: tuple[int, ...]
    vectors: list[torch.Tensor]
    buckets: Int32[np.ndarray, " rows"]
    positions: Int32[np.ndarray, " rows"]
    token_ids: Int32[np.ndarray, " rows"]
    example_ids: Int64[np.ndarray, " rows"]
    dim: int

    def __post_init__(self) -> None:
        chunk_rows = sum(len(chunk) for chunk in self.vectors)
        columns = (self.buckets, self.positions, self.token_ids, self.example_ids)
        assert all(len(column) == chunk_rows for column in columns), "columns of different lengths"
        assert all(chunk.shape[1] == len(self.heads) * self.dim for chunk in self.vectors), "heads x dim"

    def __len__(self) -> int:
        """Positions, each of which becomes one row per head."""
        return len(self.positions)
