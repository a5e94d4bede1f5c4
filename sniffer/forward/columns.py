"""Captured vectors of one (layer, kind), heads side by side, still in the model's own dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sniffer.types import Rows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Columns:
    """All captured rows of one (layer, kind), heads side by side.

    `heads` are the model's numbers of the active heads, ascending. `vectors` are chunks of shape
    (rows, heads * dim) on the CPU, contiguous, in the model's dtype, a row's first head first; `rows` say where they
    are from, over the chunks in order.
    """

    heads: tuple[int, ...]
    vectors: list[torch.Tensor]
    rows: Rows
    dim: int

    def __post_init__(self) -> None:
        assert len(self.rows) == sum(len(chunk) for chunk in self.vectors), "columns of different lengths"
        assert all(chunk.shape[1] == len(self.heads) * self.dim for chunk in self.vectors), "heads x dim"

    def __len__(self) -> int:
        """Positions, each of which becomes one row per head."""
        return len(self.rows)
