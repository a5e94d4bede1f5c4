"""The rows of a call as a batch: a document for each piece, wherever in the row it lies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.forward.moments.counting import Counting, Lies
from sniffer.forward.transfer import Vectors
from sniffer.notebook.call import Call
from sniffer.notebook.history import Branch
from sniffer.notebook.pieces import Piece
from sniffer.types import KIND, Document, Names, Picks, Sections, TokenBatch


@dataclass(frozen=True)
class CallBatch(TokenBatch):
    """`grid` are the token ids of the call, (batch, seq), padding included; `pieces` go with `documents`."""

    grid: Int32[np.ndarray, "batch seq"]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(
        cls,
        grid: Int32[np.ndarray, "batch seq"],
        pieces: Sequence[Piece],
        ids: Sequence[int],
        images: Collection[int] = (),
    ) -> CallBatch:
        """The documents of a call, each with its id; tokens among `images` have the section `image`."""
        documents = tuple(
            Document(
                example_id=number,
                source_id=str(number),
                token_ids=grid[piece.row, piece.first_column : piece.first_column + piece.n_tokens],
                truncated=False,
                first_position=piece.first_position,
                sections=_sections(grid[piece.row, piece.first_column : piece.first_column + piece.n_tokens], images),
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

    @property
    def apart(self) -> bool:
        """Whether the model has other positions for some tokens than their places (positions.py)."""
        return any(piece.apart for piece in self.pieces)

    def cells(self, picks: Picks) -> Int32[np.ndarray, " picks"]:
        """Where picks lie in the call: row * seq + column. A piece begins at some cell, which is no position."""
        begins = [piece.row * self.seq_len + piece.first_column - piece.first_position for piece in self.pieces]
        return np.array(begins, dtype=np.int32)[picks.rows] + picks.positions

    @property
    def lies(self) -> list[Lies]:
        """Where documents are in what layers show."""
        return [
            Lies(one.row, one.first_position, one.first_position + one.n_tokens, one.first_column, number)
            for number, one in enumerate(self.pieces)
        ]

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


def image_tokens(model: Any, said: Mapping[str, Any]) -> frozenset[int]:
    """The token ids that stand for images or videos in a call that brings some; else none."""
    if not any("pixel" in name or name.startswith(("image", ENCODED)) for name in said):
        return frozenset()
    config = getattr(model, "config", None)
    found = [getattr(config, name, None) for name in IMAGE_TOKENS]
    return frozenset(one for one in found if isinstance(one, int))


IMAGE = "image"
"""The section of tokens that an image, or a video, stands for."""

ENCODED = "mm_encoder_outputs"
"""What `generate` of later transformers makes of images, and hands on in their place."""

IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
"""Where configs of models for images and text name them."""


def _sections(tokens: Int32[np.ndarray, " n"], images: Collection[int]) -> Sections | None:
    if not images:
        return None
    of_image = np.isin(tokens, list(images))
    return Sections.of(Names.of(["", IMAGE], of_image.astype(np.int32)))


@dataclass(frozen=True)
class CallRows:
    """The rows of one call: what the accumulator takes. Without picks there are no vectors at all."""

    batch: CallBatch
    picks: Mapping[tuple[int, str], Picks]
    vectors: Vectors
    counting: Counting | None = None
    """Sums over all positions that the call adds, where some are wanted."""


class Keeper(Protocol):
    """What becomes of rows."""

    def keep(self, call: CallRows, branches: Mapping[int, Branch]) -> None:
        """Takes those of a call that went well, with the documents that have begun in it by parting from others."""

    def keep_partial(self, call: CallRows) -> None:
        """Takes what layers had shown of a call that raised an error."""

    def sections_until(self, number: int, position: int) -> Sections | None:
        """Those of a document's tokens before a position; None where they have none."""

    def cut(self, ends: Mapping[int, int]) -> None:
        """Lets go of what documents have from a position on."""


def of_call(states: Tensor, kind: str, layer: int, call: Call, held: int) -> Tensor:
    """The vectors of this call's tokens, where a cache shows others before them, or room for more behind them.

    Raises:
        CaptureError: they are those of other tokens, too.
    """
    batch, seq = call.shape
    columns = states.shape[2]
    if (states.shape[0], columns) == (batch, seq):
        return states
    if states.shape[0] == batch and columns > seq and KIND[kind].draw == "k" and _is_known(call.cache):
        first = first_of_call(columns, seq, held)
        return states[:, :, first : first + seq]
    raise CaptureError(
        f"layer {layer} shows {kind} of {states.shape[0]} x {columns} tokens in a call of {batch} x {seq}: "
        "leave the cache out"
    )


def _is_known(cache: Any) -> bool:
    return type(cache).__module__.startswith("transformers.")


def first_of_call(columns: int, seq: int, held: int) -> int:
    """In which column of the keys that attention is given those of a call's tokens begin.

    Static caches are filled from the start, with room behind; others end with the tokens of the call.
    """
    return held if columns > held + seq else columns - seq
