"""Which documents the rows of a call hold, and at which positions.

A *piece* is a stretch of a row that holds tokens of one document, with consecutive positions. A call may begin its
documents (`pieces_of`), go on with rows that a cache holds (`pieces_after`), or repeat rows and add to them
(`last_of`). What is not plain is refused in one line; nothing is guessed.

Some of what a call says is only as good as the model that hears it: `claims` names it, and the model has to prove that
it does as it is told (models/proofs.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.notebook.call import Call
from sniffer.notebook.masks import real_tokens

FARTHEST = 1 << 24
"""No text is as long as this: positions from here on are a mistake."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one document that lie side by side in a row of a call, at consecutive positions."""

    row: int
    first_column: int
    first_position: int
    n_tokens: int


@dataclass(frozen=True)
class Begun:
    """A row of an earlier call, which a later one goes on with.

    Its document has tokens in the columns [first, end) of the cache, if any, and the next one is at `position`.
    """

    document: int
    position: int
    first: int
    end: int

    def after(self, piece: Piece, held: int, document: int) -> Begun:
        """The row once it has a piece more, of a call that began behind `held` columns."""
        if not piece.n_tokens:
            return replace(self, document=document)
        first = self.first if self.end > self.first else held + piece.first_column
        end = held + piece.first_column + piece.n_tokens
        return Begun(document, piece.first_position + piece.n_tokens, first, end)


def pieces_of(call: Call) -> tuple[Piece, ...]:
    """The pieces of a call's rows, in order; a row of padding alone is one empty piece.

    Where a row is padded on the left and has no positions, it is taken for one whose padding counts, unless the model
    `counts` from the first token: `claims` says so.

    Raises:
        CaptureError: padding lies inside a row, positions jump, or the mask is no plain one.
    """
    real = real_tokens(call.mask, call.shape)
    positions = positions_of(call.position_ids, real)
    if positions is None and not real[:, 0].all() and call.counts():
        positions = real.cumsum(1) - 1
    return tuple(
        piece
        for row, tokens in enumerate(real)
        for piece in _pieces(row, np.flatnonzero(tokens), None if positions is None else positions[row])
    )


def pieces_after(call: Call, rows: Sequence[Begun], held: int) -> tuple[Piece, ...]:
    """The pieces of a call that goes on with some rows, behind `held` columns of its cache: one each.

    Raises:
        CaptureError: as `pieces_of`; or a row does not go on where it had ended.
    """
    columns = np.arange(held)
    earlier = np.array([(columns >= row.first) & (columns < row.end) for row in rows]).reshape(len(rows), held)
    real = real_tokens(call.mask, call.shape, earlier)
    positions = positions_of(call.position_ids, real)
    if positions is None and any(row.first or not row.end for row in rows) and call.counts():
        positions = np.array([row.position for row in rows])[:, None] + real.cumsum(1) - 1
    elif positions is None:
        positions = np.broadcast_to(held + np.arange(call.shape[1]), real.shape)
    return tuple(_next_piece(n, row, held, np.flatnonzero(real[n]), positions[n]) for n, row in enumerate(rows))


def last_of(pieces: Sequence[Piece], rows: Sequence[Begun]) -> tuple[Piece, ...]:
    """What is new of pieces that repeat some rows whole: behind where each had ended.

    Raises:
        CaptureError: a row is not the one that it was.
    """
    if [piece.row for piece in pieces] != list(range(len(rows))):
        raise CaptureError("this call repeats the one before it, and packs documents into rows: give one a row")
    return tuple(_beyond(piece, row) for piece, row in zip(pieces, rows, strict=True))


def _beyond(piece: Piece, row: Begun) -> Piece:
    n = row.end - row.first
    if piece.first_column != row.first or piece.first_position + n != row.position or piece.n_tokens < n:
        raise CaptureError(
            f"row {piece.row} of this call repeats one of the call before, at other positions or with other padding: "
            "pass the same position_ids and attention_mask, and one more of each"
        )
    return Piece(piece.row, piece.first_column + n, row.position, piece.n_tokens - n)


def _next_piece(n: int, row: Begun, held: int, columns: np.ndarray, stated: np.ndarray) -> Piece:
    begun = row.end > row.first
    if not len(columns):
        return Piece(n, 0, row.position, 0)
    first, stop = int(columns[0]), int(columns[-1]) + 1
    if stop - first != len(columns) or (begun and (first or row.end != held)):
        raise CaptureError(f"row {n} of this call goes on behind padding: pad on the left")
    if (np.diff(stated[first:stop]) != 1).any():
        raise CaptureError(f"position_ids jump within row {n} of this call, which goes on with an earlier one")
    if begun and stated[first] != row.position:
        raise CaptureError(
            f"row {n} of this call goes on at position {stated[first]}, and its last token was at {row.position - 1}: "
            "give position_ids that count on, as generate does"
        )
    return Piece(n, first, int(stated[first]), stop - first)


def claims(call: Call, pieces: Sequence[Piece]) -> dict[str, tuple[str, str]]:
    """What the model has to prove before these pieces are right; with what a message says of the call, and advises.

    Raises:
        CaptureError: documents are packed in a way that lets them see each other.
    """
    starts = {piece.row: piece for piece in reversed(pieces)}
    found = {}
    if len(starts) < len(pieces):
        if call.mask is not None or call.cache is not None:
            what = "an attention_mask" if call.mask is not None else "a cache"
            raise CaptureError(
                f"positions begin anew within a row, and beside {what} the documents there see each other: "
                "give position_ids and use_cache=False without it, or a document a row"
            )
        found["packed"] = ("has several documents in a row", "pass use_cache=False, or a document a row")
    if any(piece.first_column for piece in starts.values()):
        advice = "give position_ids that count from the first token, or set tokenizer.padding_side = 'right'"
        which = "left" if call.position_ids is not None else "counted" if call.counts() else "shifted"
        found[which] = ("is padded on the left", advice)
    if call.position_ids is not None and any(piece.first_position for piece in starts.values()):
        found["positions"] = ("has positions that do not begin at 0", "leave position_ids out")
    if call.stated and not found:
        found["stated"] = ("has position_ids", "leave them out")
    return found


def claims_after(call: Call, rows: Sequence[Begun]) -> dict[str, tuple[str, str]]:
    """What the model has to prove before a call goes on with rows of its cache; as `claims`."""
    advice = "give whole texts, without a cache"
    if any(row.first for row in rows):
        which = "cached_counted" if call.position_ids is None and call.counts() else "cached_left"
        return {which: ("goes on with rows that are padded on the left, from a cache", advice)}
    return {"cached_stated" if call.stated else "cached": ("goes on with what a cache holds", advice)}


def positions_of(position_ids: Any, real: Bool[np.ndarray, "batch seq"]) -> Int64[np.ndarray, "batch seq"] | None:
    """The positions that a call states; None where it states none.

    Some models have several positions a token, (axes, batch, seq), which are the same for text.

    Raises:
        CaptureError: they are no whole numbers from 0 on, have another shape, or differ from axis to axis.
    """
    if position_ids is None:
        return None
    kind = position_ids.dtype if isinstance(position_ids, Tensor) else torch.bool
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise CaptureError("this call's position_ids are no tensor of whole numbers: give that, or leave them out")
    stated = position_ids.detach().cpu().numpy().astype(np.int64)
    try:
        axes = np.broadcast_to(stated, (*stated.shape[:-2], *real.shape)).reshape(-1, *real.shape)
    except ValueError:
        raise CaptureError(
            f"this call's position_ids have the shape {stated.shape}, for input_ids of shape {real.shape}"
        ) from None
    if ((axes != axes[0]) & real).any():
        raise CaptureError("this call gives tokens several positions, as for images: only text has one a token")
    if real.any() and (axes[0][real].min() < 0 or axes[0][real].max() >= FARTHEST):
        raise CaptureError(f"this call's position_ids reach outside [0, {FARTHEST:,}): count positions from 0")
    return axes[0]


def _pieces(row: int, columns: Int64[np.ndarray, " _"], positions: np.ndarray | None) -> Iterator[Piece]:
    """The pieces of a row: its columns without padding, cut where positions begin anew."""
    if not len(columns):
        yield Piece(row, 0, 0, 0)
        return
    start, n = int(columns[0]), len(columns)
    if columns[-1] - start + 1 != n:
        raise CaptureError(f"row {row} of this call has padding between its tokens: pad on the right")
    if positions is None:
        yield Piece(row, start, start, n)
        return
    stated = positions[columns]
    cuts = np.flatnonzero(np.diff(stated) != 1) + 1
    for cut in cuts[stated[cuts] != 0]:
        raise CaptureError(
            f"position_ids go from {stated[cut - 1]} to {stated[cut]} in row {row} of this call: they must count on, "
            "or begin anew at 0"
        )
    for begin, end in zip([0, *cuts], [*cuts, n], strict=True):
        yield Piece(row, start + int(begin), int(stated[begin]), int(end - begin))
