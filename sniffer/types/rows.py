"""Rows: where captured vectors come from. All heads of a (layer, kind) share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from sniffer.types.documents import Picks, TokenBatch
from sniffer.types.sections import Names


@dataclass(frozen=True)
class Rows:
    """Parallel arrays, one entry per picked token, named like the columns of a part; `section` where there are some."""

    bucket: Int32[np.ndarray, " rows"]
    position: Int32[np.ndarray, " rows"]
    token_id: Int32[np.ndarray, " rows"]
    example_id: Int64[np.ndarray, " rows"]
    section: Names | None = None

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self.columns().values()}
        lengths |= set() if self.section is None else {len(self.section)}
        assert len(lengths) == 1, "columns of different lengths"

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, which: Any) -> Rows:
        """Some rows: by slice, mask, or numbers in the order wanted."""
        section = None if self.section is None else self.section[which]
        return Rows(**{name: column[which] for name, column in self.columns().items()}, section=section)

    @classmethod
    def of(cls, batch: TokenBatch, picks: Picks) -> Rows:
        """Where the picks of a batch are from."""
        examples = np.array([document.example_id for document in batch.documents], dtype=np.int64)
        places = picks.buckets, picks.positions, batch.tokens(picks), examples[picks.rows]
        return cls(*places, batch.sections(picks))

    @classmethod
    def from_columns(cls, columns: Any) -> Rows:
        """From a table's columns, whether arrays, pyarrow's or polars'; others are left out."""
        names: Any = getattr(columns, "column_names", None) or getattr(columns, "columns", ())
        section = Names.from_column(columns[SECTION]) if SECTION in names else None
        return cls(**{name: _array(columns[name]) for name in ROW_DTYPES}, section=section)

    @classmethod
    def joined(cls, pieces: Sequence[Rows]) -> Rows:
        """One after the other; of none, no rows."""
        return cls(
            **{
                name: np.concatenate([np.empty(0, dtype), *(getattr(piece, name) for piece in pieces)])
                for name, dtype in ROW_DTYPES.items()
            },
            section=Names.joined_if_any([(piece.section, len(piece)) for piece in pieces]),
        )

    def columns(self) -> dict[str, np.ndarray]:
        """Those of numbers, by name, in the order of a part."""
        return {name: getattr(self, name) for name in ROW_DTYPES}

    def same(self, other: Rows) -> bool:
        if (self.section is None) != (other.section is None):
            return False
        alike = self.section is None or other.section is None or self.section.same(other.section)
        return alike and all(np.array_equal(mine, getattr(other, name)) for name, mine in self.columns().items())

    @property
    def order(self) -> Int64[np.ndarray, " rows"]:
        """That brings them into the order in which they are read: by (bucket, example_id, position)."""
        return np.lexsort(self._keys)

    @property
    def part_order(self) -> Int64[np.ndarray, " rows"]:
        """That brings them into the order of a part: by (section, bucket, example_id, position)."""
        return self.order if self.section is None else np.lexsort((*self._keys, self.section.codes))

    @property
    def in_part_order(self) -> bool:
        """Whether each comes after the one before it, none of them twice."""
        same = np.ones(max(0, len(self) - 1), dtype=bool)
        for column in (*self._keys, *([] if self.section is None else [self.section.codes])):
            same &= np.diff(column) == 0
        return bool((self.part_order == np.arange(len(self))).all() and not same.any())

    @property
    def _keys(self) -> tuple[np.ndarray, ...]:
        return self.position, self.example_id, self.bucket


ROW_DTYPES = {"bucket": np.int32, "position": np.int32, "token_id": np.int32, "example_id": np.int64}
"""The columns of `Rows` that all runs have, in the order of a part."""

UNKNOWN_TOKEN = -1
"""The token id of rows that were imported, where nobody knows it."""

SECTION = "section"
"""The one that only runs with sections have."""


def _array(column: Any) -> np.ndarray:
    return column if isinstance(column, np.ndarray) else column.to_numpy()
