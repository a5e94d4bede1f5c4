"""What a call adds: which of its tokens are new, to which documents they belong, and what the model has to prove.

begins      rows are documents, with the next ids; beside an empty cache, equal rows are one, as beams of a prompt are
goes on     rows of a cache go on with the documents that are in it
repeats     without a cache, the rows of the call before and one token more each: that token is new
unknown     a cache that was filled elsewhere: nothing is captured, and it is told
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from sniffer.errors import CaptureError
from sniffer.notebook.call import Call
from sniffer.notebook.example_ids import ExampleIds
from sniffer.notebook.history import Branch, CallHistory, as_array
from sniffer.notebook.missed import Missed
from sniffer.notebook.pieces import Begun, Piece, claims, claims_after, last_of, pieces_after, pieces_of

Prove = Callable[[Mapping[str, tuple[str, str]]], None]
"""Raises CaptureError for a claim that the model cannot prove."""


@dataclass(frozen=True)
class Heard:
    """What a call adds.

    Attributes:
        pieces: of new tokens, those that are captured; `documents` are theirs.
        rows: as they will be after the call; none where nothing can go on with them.
        held: the columns of its cache before it.
        taken: ids that were given out for it; `branches` are documents that begin in it by parting from others.
    """

    pieces: tuple[Piece, ...]
    documents: tuple[int, ...]
    rows: tuple[Begun, ...]
    held: int = 0
    taken: tuple[int, ...] = ()
    branches: Mapping[int, Branch] = field(default_factory=dict)


def hear(call: Call, history: CallHistory, ids: ExampleIds, missed: Missed, prove: Prove) -> Heard | None:
    """What a call adds; None where it goes on with what is not known.

    Raises:
        CaptureError: it cannot be told, or the model does not do as the call says.
    """
    held, begun = history.held_by(call)
    if held and begun is None:
        missed.passed_over += 1
        missed.passed_over_tokens += call.tokens.numel()
        return None
    if begun is not None:
        prove(claims_after(call, begun))
        return _going_on(pieces_after(call, begun, held), begun, held, history)
    pieces = pieces_of(call)
    prove(claims(call, pieces))
    repeated = history.repeated_by(call)
    if repeated is None:
        return _beginning(call, pieces, ids, missed)
    if ids.given:
        raise CaptureError(
            "this call is the one before it and a token more, as generate(use_cache=False) makes them: whether it "
            "is a document cannot be known; leave example_ids out, or generate with a cache"
        )
    if call.use_cache is not False:
        missed.repeats += 1
    return _going_on(last_of(pieces, repeated), repeated, 0, history)


def _going_on(pieces: tuple[Piece, ...], begun: Sequence[Begun], held: int, history: CallHistory) -> Heard:
    documents, branches = history.documents(begun)
    rows = [row.after(piece, held, one) for row, piece, one in zip(begun, pieces, documents, strict=True)]
    return Heard(pieces, tuple(documents), tuple(rows), held, (), branches)


def _beginning(call: Call, pieces: tuple[Piece, ...], ids: ExampleIds, missed: Missed) -> Heard:
    batch = call.shape[0]
    alone = len(pieces) == batch
    # Of equal rows, the first.
    first = _first_equal(call, pieces) if alone and call.cache is not None else list(range(len(pieces)))
    kept = [piece for number, piece in enumerate(pieces) if first[number] == number]
    if len(kept) < len(pieces):
        if ids.given:
            raise CaptureError(
                "rows of this call are the same, as generate makes them of one prompt for several beams or "
                "sequences: which has which id cannot be known; leave example_ids out"
            )
        missed.shared_rows += len(pieces) - len(kept)
    taken = ids.take(len(kept))
    rows: list[Begun] = []
    if alone:
        of = {piece.row: number for piece, number in zip(kept, taken, strict=True)}
        numbers = [of[one] for one in first]
        rows = [
            Begun(n, piece.first_position, 0, 0).after(piece, 0, n) for n, piece in zip(numbers, pieces, strict=True)
        ]
    return Heard(tuple(kept), tuple(taken), tuple(rows), 0, tuple(taken))


def _first_equal(call: Call, pieces: Sequence[Piece]) -> list[int]:
    """For each row, the first one that has the same tokens, padding and positions, and the same images."""
    tokens = as_array(call.tokens)
    known: dict[tuple[bytes, Piece], list[int]] = {}
    found = []
    for n, piece in enumerate(pieces):
        alike = known.setdefault((tokens[n].tobytes(), replace(piece, row=0)), [])
        first = next((one for one in alike if _same_images(call, tokens[n], one, n)), n)
        if first == n:
            alike.append(n)
        found.append(first)
    return found


def _same_images(call: Call, tokens: np.ndarray, one: int, other: int) -> bool:
    """Of rows with the same tokens; which images are whose is seen in the vectors that stand for them alone."""
    if not np.isin(tokens, list(call.images)).any():
        return True
    return call.vectors is not None and torch.equal(call.vectors[one], call.vectors[other])
