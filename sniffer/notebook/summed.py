"""Sums over all positions of what calls have added, as a run's moments.

A step has one position of each document, or a few, for which sums of their own would be dear. So the vectors of the
last tokens of HELD calls are kept, and then summed as stretches of their documents. Until then a cache may lose some of
them, as it does wrong guesses of assisted decoding; what is summed cannot be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sniffer.errors import RunError
from sniffer.forward.moments.counting import Counting, Lies, MomentsPlan, Totals
from sniffer.notebook.batch import CallBatch
from sniffer.reader.moments import merged
from sniffer.types import Document, MomentRows, Moments, Sections, TokenBatch

FEW = 32
"""Tokens of a text whose vectors are held, of each call; those before them are summed at once."""

HELD, HELD_BYTES = 64, 1 << 28
"""Calls whose vectors are held, and bytes of these."""


class HeldCall(Counting):
    """Sums of a call as its layers are seen, but of the last tokens of each document the vectors themselves.

    Attributes:
        held: those tokens, of one document after the other.
        vectors: of these, (tokens, heads, dim), of the heads that are counted; `nbytes` of them in all.
    """

    def __init__(self, plan: MomentsPlan, batch: CallBatch) -> None:
        some = [min(FEW, piece.n_tokens) for piece in batch.pieces]
        before = [replace(one, end=one.end - n) for one, n in zip(batch.lies, some, strict=True)]
        super().__init__(plan, batch, (), before)
        self.held = [_Held.last(document, n) for document, n in zip(batch.documents, some, strict=True)]
        ends = [piece.first_column + piece.n_tokens for piece in batch.pieces]
        self._rows = np.repeat([piece.row for piece in batch.pieces], some)
        self._columns = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, some, strict=True)])
        self._sums_some = any(one.end > one.first for one in before)
        self._index: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.vectors: dict[tuple[int, str], Tensor] = {}
        self.nbytes = 0

    def see(self, layer: int, kind: str, states: Tensor, heads: Tensor | None) -> None:
        """Takes what a layer shows of a kind, as `Counting.see`."""
        self.sums[layer, kind] = {}
        if self._sums_some:
            super().see(layer, kind, states, heads)
        if states.device not in self._index:
            rows, columns = (torch.from_numpy(one).to(states.device) for one in (self._rows, self._columns))
            self._index[states.device] = rows, columns
        rows, columns = self._index[states.device]
        last = states[rows, :, columns]
        self.vectors[layer, kind] = last if heads is None else last.index_select(1, heads)
        self.nbytes += self.vectors[layer, kind].nbytes


def counting_of(plan: MomentsPlan | None, batch: CallBatch) -> HeldCall | None:
    """What counts a call; None where nothing is wanted."""
    return None if plan is None else HeldCall(plan, batch)


@dataclass(frozen=True)
class _Held:
    """Tokens of a document in a held call: those that are left of them, of `n` that there were."""

    document: Document
    n: int

    @classmethod
    def last(cls, document: Document, n: int) -> _Held:
        return cls(_cut(document, document.n_tokens - n, document.n_tokens), n)

    @property
    def end(self) -> int:
        """The position behind the last."""
        return self.document.first_position + self.document.n_tokens

    def until(self, end: int) -> _Held:
        left = max(0, min(self.end, end) - self.document.first_position)
        return replace(self, document=_cut(self.document, 0, left))


def _cut(document: Document, start: int, end: int) -> Document:
    sections = None if document.sections is None else document.sections.cut(start, end)
    first = document.first_position + start
    return replace(document, token_ids=document.token_ids[start:end], sections=sections, first_position=first)


class Summed:
    """Those of all calls since `clear`.

    `lost` counts tokens of documents that a cache has lost after they were summed up, which cannot be undone.
    """

    def __init__(self, plan: MomentsPlan) -> None:
        self.plan = plan
        self.clear()

    def clear(self) -> None:
        self.lost = 0
        self._totals = Totals(self.plan)
        self._calls: list[HeldCall] = []

    def take(self, counting: Counting) -> None:
        """Those of a call that went well."""
        with torch.inference_mode():
            self._totals.take(counting)
        assert isinstance(counting, HeldCall)
        self._calls.append(counting)
        if len(self._calls) >= HELD or sum(call.nbytes for call in self._calls) > HELD_BYTES:
            # The last call may have made guesses.
            self._sum(self._calls[:-1])
            del self._calls[:-1]

    def cut(self, ends: Mapping[int, int], lost: Mapping[int, int]) -> None:
        """Lets go of what documents have from a position on, which is so many tokens of each."""
        self.lost += sum(lost.values())
        for call in self._calls:
            left = [one.until(ends.get(one.document.example_id, one.end)) for one in call.held]
            self.lost -= sum(one.end - other.end for one, other in zip(call.held, left, strict=True))
            call.held = left

    def of(self, layer: int, head: int, kind: str, bucket: int | None, section: str | None) -> Moments:
        """Of one head, as `run.moments`.

        Raises:
            RunError: they were not asked for, there are none, or they are not of the documents alone.
        """
        heads = self.plan.heads.get((layer, kind), ())
        if head not in heads:
            raise RunError(f"layer {layer}, kind {kind}, head {head} was not counted: see captured.selection.moments")
        for rows in self.rows():
            if rows and (rows[0].layer, rows[0].kind) == (layer, kind):
                found = [(one.bucket, one.section, one.of(head, self.plan.layout)) for one in rows]
                return merged(found, bucket, section)
        raise RunError("no document has been counted: there are no moments")

    def rows(self) -> Iterator[list[MomentRows]]:
        """All there is of each (layer, kind).

        Raises:
            RunError: they are of tokens that are no documents' any more.
        """
        if self.lost:
            raise RunError(
                f"moments are of {self.lost} tokens that a cache has lost after they were summed, and sums cannot be "
                "taken back: read moments when a text is whole, and crop a cache by whole calls, or few tokens"
            )
        self._sum(self._calls)
        self._calls = []
        return self._totals.rows()

    def _sum(self, calls: list[HeldCall]) -> None:
        """Sums up some calls, a document's tokens that follow one another together."""
        place, stretches = 0, _Stretches()
        for call in calls:
            for one in call.held:
                stretches.add(one.document, place)
                place += one.n
        if not stretches.places:
            return
        batch, places = stretches.batch, torch.from_numpy(stretches.index)
        lies = [Lies(n, one.first_position, one.first_position + one.n_tokens) for n, one in enumerate(batch.documents)]
        counting = Counting(self.plan, batch, (), lies)
        with torch.inference_mode():
            for layer, kind in self.plan.heads:
                together = torch.cat([call.vectors[layer, kind] for call in calls])
                together = together[places.to(together.device)]
                counting.see(layer, kind, together.transpose(1, 2), None)
            self._totals.take(counting)


class _Stretches:
    """Tokens that follow one another in a document, and where they are."""

    def __init__(self) -> None:
        self.places: list[np.ndarray] = []
        self._documents: list[Document] = []
        self._last: dict[int, int] = {}

    def add(self, document: Document, place: int) -> None:
        """Tokens of a document, the first of which is at a place."""
        if not document.n_tokens:
            return
        places = np.arange(place, place + document.n_tokens)
        last = self._last.get(document.example_id)
        if last is not None and _follows(self._documents[last], document):
            self._documents[last] = _joined(self._documents[last], document)
            self.places[last] = np.concatenate([self.places[last], places])
            return
        self._last[document.example_id] = len(self.places)
        self._documents.append(document)
        self.places.append(places)

    @property
    def batch(self) -> TokenBatch:
        return TokenBatch(tuple(self._documents), 0)

    @property
    def index(self) -> np.ndarray:
        """The place of each token, a row for each stretch; any place behind the end of one."""
        found = np.zeros((len(self.places), max(map(len, self.places))), dtype=np.int64)
        for row, places in zip(found, self.places, strict=True):
            row[: len(places)] = places
        return found


def _follows(one: Document, other: Document) -> bool:
    return one.first_position + one.n_tokens == other.first_position


def _joined(one: Document, other: Document) -> Document:
    both = one, other
    sections = Sections.joined_if_any([(document.sections, document.n_tokens) for document in both])
    token_ids = np.concatenate([document.token_ids for document in both])
    return replace(one, token_ids=token_ids, sections=sections)
