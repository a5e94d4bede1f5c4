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

import numpy as np
from jaxtyping import Int64

from sniffer.errors import CaptureError
from sniffer.notebook.call import Call
from sniffer.notebook.masks import real_tokens
from sniffer.notebook.positions import Stated, stated_by


@dataclass(frozen=True)
class Piece:
    """Tokens of one document that lie side by side in a row of a call, at consecutive positions.

    `apart`: how far from its place in the text the model states what comes next, behind images (positions.py).
    """

    row: int
    first_column: int
    first_position: int
    n_tokens: int
    apart: int = 0


@dataclass(frozen=True)
class Begun:
    """A row of an earlier call, which a later one goes on with.

    Its document has tokens in the columns [first, end) of the cache, if any, and the next one is at `position`, which
    is stated `apart` from there.
    """

    document: int
    position: int
    first: int
    end: int
    apart: int = 0

    def after(self, piece: Piece, held: int, document: int) -> Begun:
        """The row once it has a piece more, of a call that began behind `held` columns."""
        if not piece.n_tokens:
            return replace(self, document=document)
        first = self.first if self.end > self.first else held + piece.first_column
        end = held + piece.first_column + piece.n_tokens
        return Begun(document, piece.first_position + piece.n_tokens, first, end, piece.apart)


def pieces_of(call: Call) -> tuple[Piece, ...]:
    """The pieces of a call's rows, in order; a row of padding alone is one empty piece.

    Where a row is padded on the left and has no positions, it is taken for one whose padding counts, unless the model
    `counts` from the first token: `claims` says so.

    Raises:
        CaptureError: padding lies inside a row, positions jump, or the mask is no plain one.
    """
    real = real_tokens(call.mask, call.shape)
    stated = stated_by(call, real)
    if stated is None and not real[:, 0].all() and call.counts():
        stated = Stated(real.cumsum(1) - 1, (0,) * len(real))
    return tuple(
        piece if stated is None else replace(piece, apart=stated.apart[row])
        for row, tokens in enumerate(real)
        for piece in _pieces(row, np.flatnonzero(tokens), None if stated is None else stated.places[row])
    )


def pieces_after(call: Call, rows: Sequence[Begun], held: int) -> tuple[Piece, ...]:
    """The pieces of a call that goes on with some rows, behind `held` columns of its cache: one each.

    Raises:
        CaptureError: as `pieces_of`; or a row does not go on where it had ended.
    """
    columns = np.arange(held)
    earlier = np.array([(columns >= row.first) & (columns < row.end) for row in rows]).reshape(len(rows), held)
    real = real_tokens(call.mask, call.shape, earlier)
    apart = tuple(row.apart for row in rows)
    stated = stated_by(call, real, apart)
    if stated is None and any(row.first or not row.end for row in rows) and call.counts():
        stated = Stated(np.array([row.position for row in rows])[:, None] + real.cumsum(1) - 1, apart)
    elif stated is None:
        stated = Stated(np.broadcast_to(held + np.arange(call.shape[1]), real.shape), apart)
    pieces = (_next_piece(n, row, held, np.flatnonzero(real[n]), stated.places[n]) for n, row in enumerate(rows))
    return tuple(replace(piece, apart=stated.apart[piece.row]) for piece in pieces)


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
    return Piece(piece.row, piece.first_column + n, row.position, piece.n_tokens - n, piece.apart)


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
