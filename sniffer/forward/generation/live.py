"""What is captured while a model writes: picked rows of the prompts, and of each step, as decoding sees them.

Which positions are kept is drawn once, for documents as long as they may become. A step at which no document has a
picked position is not tapped at all, and costs nothing, unless moments are wanted, which are of all positions. In a
step the keys are those of all tokens before, whose last column is the new one's. What was gathered of a text beyond its
end is left out, once it is known where that is. Prompts may come in chunks, each a forward over some of their columns.

    prompts  . . 5 6 7      step 1  4      step 2  5        columns of a batch of two, with positions
             0 1 2 3 4              5              6
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.forward.gather import gather
from sniffer.forward.generation.attention import StepAttention
from sniffer.forward.generation.columns import Columns
from sniffer.forward.generation.moments import StepMoments
from sniffer.forward.moments.counting import Counting
from sniffer.forward.observer import Wanted, draw
from sniffer.forward.selection import Selection
from sniffer.sampler import Picker
from sniffer.tap import TAP, Attended, Seen, Tap
from sniffer.types import ATTENTION, KIND, Answer, Caching, Document, Generated, Picks, TokenBatch, draw_of

Places = Int64[np.ndarray, " picks"]
"""Rows and positions of picks as one number each, row * ROW + position."""

ROW = 1 << 32
NOWHERE = np.empty(0, np.int64)


@dataclass
class LiveRows:
    """The rows of a batch, whole, as an `Observer` has them, but that they are on the device yet."""

    batch: TokenBatch
    picks: Mapping[tuple[int, str], Picks]
    vectors: dict[tuple[int, str], Tensor]
    seconds: float
    counting: Counting | None = None


class Live:
    """Gathers what a selection wants while the prompts of a batch are gone on with.

    It is told when a forward has ended; `seconds` is the time spent gathering.

    Args:
        possible: by (layer, draw), the places that may be kept, ascending.
        plan: as of an `Observer`.
        pre: whether the pre kinds are wanted.
        longest: the documents as long as they may become, where statistics of attention or moments are wanted.
        counted: example ids of documents whose moments there are already.
        caching: how prompts come in, and where in a cache new tokens are.
    """

    def __init__(
        self,
        prompts: TokenBatch,
        possible: Mapping[tuple[int, str], Places],
        plan: Wanted,
        longest: Sequence[Document] = (),
        counted: Collection[int] = (),
        caching: Caching = Caching(),  # noqa: B008 - it is frozen
        *,
        pre: bool,
    ) -> None:
        self.prompts = prompts
        self._caching = caching
        self.seconds = 0.0
        self._plan, self._pre = plan, pre
        self._step = 0
        self._at: dict[int, Columns] = {}
        self._attended: dict[int, Columns] = {}
        self._places = _by_step(prompts, possible)
        self._padding = prompts.seq_len - np.array([one.n_tokens for one in prompts.documents], np.int64)
        attention, moments = plan.attention, plan.moments
        told = longest, self._padding.tolist(), plan.transfer, caching
        self._attention = None if attention is None else StepAttention(attention, *told)
        self._moments = None if moments is None else StepMoments(moments, prompts, longest, counted)
        self._pieces: dict[tuple[int, str], list[tuple[Places, Tensor]]] = defaultdict(list)
        self._picked: dict[tuple[tuple[int, str], Columns], Places] = {}
        self._flat: dict[tuple[tuple[int, str], Columns, torch.device], Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """The tap, for as long as the model writes: open in those steps at which something is wanted."""
        before = TAP.exchange(self._tap())
        try:
            yield
        finally:
            TAP.exchange(before)

    def advance(self, written: Sequence[int]) -> None:
        """A forward has ended; of each text so many tokens were written until then."""
        if self._moments is not None:
            self._moments.written = list(written)
        self._step += 1
        for remembered in (self._at, self._attended, self._picked, self._flat):
            remembered.clear()
        TAP.exchange(self._tap())

    @property
    def waits(self) -> bool:
        """Whether the next step has something that is wanted."""
        return self._step in self._places or (self._moments is not None and self._moments.wanted)

    def __call__(self, seen: Seen) -> None:
        started = time.perf_counter()
        layer = self._plan.layer_of.get(seen.module)
        if layer is not None:
            at = self._at[layer] = self._next(layer)
            for kind in self._plan.kinds.get(layer, ()):
                places = self._places_at(draw_of((layer, kind)), at)
                if len(places):
                    self._keep(layer, kind, self._new(layer, kind, KIND[kind].shown(seen), at), at)
            if self._moments is not None and self._moments.wanted:
                self._count(self._moments, layer, seen, at)
        self.seconds += time.perf_counter() - started

    def called(self, shown: Attended) -> None:
        """A call of attention is over."""
        started = time.perf_counter()
        layer = self._plan.layer_of.get(shown.module)
        if layer in self._at and self._attention is not None and self._attention.wants(layer):
            at = self._at[layer]
            if self._attended.get(layer) == at:
                raise CaptureError(f"layer {layer} attends twice in one step: set generate.live=false")
            self._attended[layer] = at
            places = self._places_at(draw_of((layer, ATTENTION)), at)
            if len(places):
                columns = self._attention.of_step(layer, shown, at, *np.divmod(places, ROW))
                self._pieces[layer, ATTENTION].append((places, self._plan.statistics(layer, columns)))
        self.seconds += time.perf_counter() - started

    def rows(self, batch: TokenBatch, picks: Mapping[tuple[int, str], Picks]) -> LiveRows:
        """The rows of these picks, of the documents as they have become.

        Raises:
            CaptureError: one was not shown.
        """
        started = time.perf_counter()
        more = () if self._attention is None else (ATTENTION,)
        vectors = {
            (layer, kind): self._ordered(layer, kind, places_of(picks[draw_of((layer, kind))]))
            for layer, kinds in self._plan.kinds.items()
            for kind in (*kinds, *more)
        }
        self._pieces.clear()
        self.seconds += time.perf_counter() - started
        counting = None if self._moments is None else self._moments.end(batch)
        return LiveRows(batch, picks, vectors, self.seconds, counting)

    def _tap(self) -> Tap | None:
        attended = self._attention is not None and self._step in self._places
        return Tap(self, self._pre, self.called if attended else None) if self.waits else None

    def _count(self, moments: StepMoments, layer: int, seen: Seen, at: Columns) -> None:
        for kind in moments.plan.kinds_of(layer):
            states = self._new(layer, kind, KIND[kind].shown(seen), at)
            moments.see(layer, kind, states, self._plan.heads(layer, kind, states.device, moments.plan.heads), at)

    def _next(self, layer: int) -> Columns:
        """The columns that a layer shows in this forward, after those that it has shown."""
        seq = self.prompts.seq_len
        end = seq + self._step
        begin = self._at[layer].end if layer in self._at else end - (seq if self._step == 0 else 1)
        if begin == end:
            raise CaptureError(f"layer {layer} shows its q twice in one step: only one tap may stand in its way")
        return Columns(begin, min(self._caching.chunk or seq, end - begin))

    def _new(self, layer: int, kind: str, states: Tensor, at: Columns) -> Shaped[Tensor, "batch heads new dim"]:
        """What is shown of the tokens of this forward."""
        rows, queries = len(self.prompts.documents), KIND[kind].draw == "q"
        if states.shape[0] != rows or states.shape[2] < at.new or (queries and states.shape[2] != at.new):
            raise CaptureError(
                f"layer {layer} shows its {kind} as {tuple(states.shape)} in a step of {rows} x {at.new} tokens: its "
                "generation cannot be captured live; set generate.live=false"
            )
        new: Tensor = states if queries else self._caching.newest(states, at.begin, at.new)
        return new

    def _keep(self, layer: int, kind: str, new: Tensor, at: Columns) -> None:
        draw, heads = draw_of((layer, kind)), self._plan.heads(layer, kind, new.device)
        if (draw, at, new.device) not in self._flat:
            rows, positions = np.divmod(self._picked[draw, at], ROW)
            flat = rows * at.new + self._padding[rows] + positions - at.begin
            self._flat[draw, at, new.device] = self._plan.transfer.upload(flat.astype(np.int32), new.device)
        self._pieces[layer, kind].append((self._picked[draw, at], gather(new, self._flat[draw, at, new.device], heads)))

    def _places_at(self, draw: tuple[int, str], at: Columns) -> Places:
        """The places of a (layer, draw) that are in some columns of this step."""
        if (draw, at) not in self._picked:
            places = self._places.get(self._step, {}).get(draw, NOWHERE)
            if self._step == 0 and self._caching.chunk is not None:
                rows, positions = np.divmod(places, ROW)
                columns = self._padding[rows] + positions
                places = places[(columns >= at.begin) & (columns < at.end)]
            self._picked[draw, at] = places
        return self._picked[draw, at]

    def _ordered(self, layer: int, kind: str, wanted: Places) -> Tensor:
        pieces = self._pieces[layer, kind]
        found = np.concatenate([NOWHERE, *(places for places, _ in pieces)])
        order = np.argsort(found, kind="stable")
        at = np.searchsorted(found[order], wanted)
        if len(wanted) and (at.max() >= len(found) or (found[order][at] != wanted).any()):
            raise CaptureError(f"layer {layer} has not shown its {kind} of every token: set generate.live=false")
        if not pieces:
            return torch.empty((0, 0))
        together = torch.cat([vectors for _, vectors in pieces])
        index = self._plan.transfer.upload(order[at].astype(np.int32), together.device)
        return together.index_select(0, index)


def places_of(picks: Picks) -> Places:
    """Ascending, as picks are."""
    found: Places = picks.rows.astype(np.int64) * ROW + picks.positions
    return found


def possible_places(
    picker: Picker, selection: Selection, prompts: TokenBatch, new_tokens: int, answer: Answer
) -> dict[tuple[int, str], Places]:
    """What may be kept, by (layer, draw), of documents as long as they may become.

    Of which section a token will be is not known where several are possible: then it is kept that is kept in any.
    """
    found: dict[tuple[int, str], Places] = {}
    for name in answer.known:
        longest = TokenBatch(longest_of(prompts, new_tokens, name), prompts.pad_id)
        for pair, picks in draw(picker, selection, longest).items():
            found[pair] = np.union1d(found.get(pair, NOWHERE), places_of(picks))
    return found


def longest_of(prompts: TokenBatch, new_tokens: int, section: str) -> tuple[Document, ...]:
    """The documents as long as they may become, if all that is written is of one section."""
    nothing = Generated(np.zeros(new_tokens, dtype=np.int32), "length")
    return tuple(replace(one.continued(nothing, Answer(section)), generated=None) for one in prompts.documents)


def _by_step(
    prompts: TokenBatch, possible: Mapping[tuple[int, str], Places]
) -> dict[int, dict[tuple[int, str], Places]]:
    """The places of each (layer, draw) at each step that has any: step 0 is the prompts'."""
    lengths = np.array([document.n_tokens for document in prompts.documents])
    found: dict[int, dict[tuple[int, str], Places]] = defaultdict(dict)
    for pair, places in possible.items():
        rows, positions = np.divmod(places, ROW)
        steps = np.maximum(0, positions - lengths[rows] + 1)
        order = np.argsort(steps, kind="stable")
        numbers, starts = np.unique(steps[order], return_index=True)
        pieces = np.split(places[order], starts[1:]) if len(places) else []
        for number, some in zip(numbers.tolist(), pieces, strict=True):
            found[number][pair] = some
    return dict(found)
