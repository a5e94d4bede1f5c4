"""The rows of a call as a batch: a document for each piece, wherever in the row it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from sniffer.errors import CaptureError
from sniffer.notebook.call import Piece
from sniffer.types import Document, Picks, TokenBatch


@dataclass(frozen=True)
class CallBatch(TokenBatch):
    """`grid` are the token ids of the call, (batch, seq), padding included; `pieces` go with `documents`."""

    grid: Int32[np.ndarray, "batch seq"]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, grid: Int32[np.ndarray, "batch seq"], pieces: Sequence[Piece], ids: Sequence[int]) -> CallBatch:
        """The documents of a call, each with its id."""
        documents = tuple(
            Document(
                example_id=number,
                source_id=str(number),
                token_ids=grid[piece.row, piece.first_column : piece.first_column + piece.n_tokens],
                truncated=False,
                first_position=piece.first_position,
            )
            for piece, number in zip(pieces, ids, strict=True)
        )
        return cls(documents, 0, grid, tuple(pieces))

    @property
    def n_rows(self) -> int:
        return len(self.grid)

    @property
    def seq_len(self) -> int:
        return self.grid.shape[1]

    @property
    def repeated(self) -> int:
        """How many rows are the same as another one."""
        return len(self.grid) - len(np.unique(self.grid, axis=0))

    def cells(self, picks: Picks) -> Int32[np.ndarray, " picks"]:
        """Where picks lie in the call: row * seq + column. A piece begins at some cell, which is no position."""
        begins = [piece.row * self.seq_len + piece.first_column - piece.first_position for piece in self.pieces]
        return np.array(begins, dtype=np.int32)[picks.rows] + picks.positions

    def tokens(self, picks: Picks) -> Int32[np.ndarray, " picks"]:
        return self.grid.reshape(-1)[self.cells(picks)]


def check_ids(ids: Any, vocabulary: int) -> None:
    """Refuses token ids that the embedding has no row for, padding too, before a forward on a GPU could die of them.

    Args:
        ids: what the backbone is given to look up; None where it is given vectors.

    Raises:
        CaptureError: naming the first of them and its place.
    """
    if ids is None:
        return
    array = ids.detach().cpu().numpy()
    wrong = np.argwhere((array < 0) | (array >= vocabulary))
    if len(wrong):
        row, column = map(int, wrong[0])
        raise CaptureError(
            f"this call has the token {int(array[row, column])} in row {row}, column {column}, and the model's "
            f"embedding has rows 0 to {vocabulary - 1}: give ids of its own tokenizer, for padding too"
        )
