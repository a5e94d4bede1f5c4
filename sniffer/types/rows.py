"""Rows: where captured vectors come from. All heads of a (layer, kind) share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from sniffer.types.documents import Picks, TokenBatch


@dataclass(frozen=True)
class Rows:
    """Parallel arrays, one entry per picked token, named like the columns of a part."""

    bucket: Int32[np.ndarray, " rows"]
    position: Int32[np.ndarray, " rows"]
    token_id: Int32[np.ndarray, " rows"]
    example_id: Int64[np.ndarray, " rows"]

    def __post_init__(self) -> None:
        assert len({len(column) for column in self.columns().values()}) == 1, "columns of different lengths"

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, which: Any) -> Rows:
        """Some rows: by slice, mask, or numbers in the order wanted."""
        return Rows(**{name: column[which] for name, column in self.columns().items()})

    @classmethod
    def of(cls, batch: TokenBatch, picks: Picks) -> Rows:
        """Where the picks of a batch are from."""
        examples = np.array([document.example_id for document in batch.documents], dtype=np.int64)
        return cls(picks.buckets, picks.positions, batch.tokens(picks), examples[picks.rows])

    @classmethod
    def from_columns(cls, columns: Any) -> Rows:
        """From a table's columns, whether arrays, pyarrow's or polars'; others are left out."""
        return cls(**{name: _array(columns[name]) for name in ROW_DTYPES})

    @classmethod
    def joined(cls, pieces: Sequence[Rows]) -> Rows:
        """One after the other; of none, no rows."""
        return cls(
            **{
                name: np.concatenate([np.empty(0, dtype), *(getattr(piece, name) for piece in pieces)])
                for name, dtype in ROW_DTYPES.items()
            }
        )

    def columns(self) -> dict[str, np.ndarray]:
        """By name, in the order of a part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def same(self, other: Rows) -> bool:
        return all(np.array_equal(mine, getattr(other, name)) for name, mine in self.columns().items())

    @property
    def order(self) -> Int64[np.ndarray, " rows"]:
        """That brings them into the order of a part: by (bucket, example_id, position)."""
        return np.lexsort((self.position, self.example_id, self.bucket))

    @property
    def in_order(self) -> bool:
        """Whether each comes after the one before it, none of them twice."""
        same = np.ones(max(0, len(self) - 1), dtype=bool)
        for column in (self.bucket, self.example_id, self.position):
            same &= np.diff(column) == 0
        return bool((self.order == np.arange(len(self))).all() and not same.any())


ROW_DTYPES = {"bucket": np.int32, "position": np.int32, "token_id": np.int32, "example_id": np.int64}
"""The columns of `Rows`, in the order of a part."""


def _array(column: Any) -> np.ndarray:
    return column if isinstance(column, np.ndarray) else column.to_numpy()
