"""From calls of a model to rows that are kept: the hooks by which sniff (sniffing.py) listens.

    a call begins      it is told what it adds to which documents (hearing.py), picks are drawn, the tap opens
    a layer attends    the observer gathers
    the call ends      the rows are whole, and wait
    the outermost      they are kept; if anything in it failed, nothing is, and the ids go to the next call

A model of several parts has a call within a call; all of them are listened to. The listener is its thread's: what other
threads do with the model meanwhile is counted, and otherwise left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sniffer.errors import CaptureError
from sniffer.forward.attention.attending import AttentionPlan
from sniffer.forward.attention.statistics import NamedSections
from sniffer.forward.moments.counting import MomentsPlan
from sniffer.forward.observer import Observer, Wanted, close_tap, open_tap
from sniffer.forward.selection import Selection
from sniffer.forward.transfer import Vectors, transfer_for
from sniffer.notebook.ahead import Ahead
from sniffer.notebook.attached import Attached
from sniffer.notebook.attending import CallAttention, beside, require_room
from sniffer.notebook.batch import CallBatch, CallRows, Keeper, check_ids, image_tokens, of_call
from sniffer.notebook.caches import cache_in
from sniffer.notebook.call import CACHES, Call, arguments, read
from sniffer.notebook.example_ids import ExampleIds
from sniffer.notebook.hearing import Heard, hear
from sniffer.notebook.history import CallHistory, as_array
from sniffer.notebook.hooks import Hook, is_running
from sniffer.notebook.missed import Missed
from sniffer.notebook.summed import counting_of
from sniffer.notebook.under_way import Frame, Whole
from sniffer.sampler import Picker
from sniffer.types import Sections, by_number

if TYPE_CHECKING:
    from sniffer.tap import Seen


class Listener:
    """Hears every call of a model.

    Args:
        keeper: is given the rows of each call that went well.
        missed: counts the rest.
        attention: what is kept of what queries do with their keys, if anything; `moments` what is summed.
    """

    def __init__(
        self,
        backbone: Attached,
        selection: Selection,
        picker: Picker,
        ids: ExampleIds,
        keeper: Keeper,
        missed: Missed,
        attention: AttentionPlan | None = None,
        moments: MomentsPlan | None = None,
    ) -> None:
        self.missed = missed
        self.history = CallHistory(keeper.cut)
        self._backbone = backbone
        self._selection = selection
        self._ahead = Ahead(picker, selection)
        self._ids = ids
        self._keeper = keeper
        self._attention, self._moments = attention, moments
        layers = backbone.geometry if attention is None else map(attention.layout.of_layer, backbone.geometry)
        self._geometry = by_number(layers)
        self._transfer = transfer_for(backbone.device)
        where = backbone.layer_of, self._transfer, backbone.device
        self._plan = Wanted(selection, self._geometry, *where, moments=moments)
        self._pre = selection.wants_pre
        self._thread = get_ident()
        self._frames: list[Frame] = []
        self._open = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears calls for the length of a `with`."""
        handles = []
        for module in self._backbone.calls:
            begin, end = self._hooks(module)
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(end, always_call=True))
        first = min(self._backbone.layer_of, key=lambda attention: self._backbone.layer_of[attention])
        handles.append(first.register_forward_pre_hook(self._watch(first)))
        self._open = True
        try:
            yield
        finally:
            self._open = False
            for handle in handles:
                handle.remove()
            self._abandon(0)
            self.settle()
            self.history.forget()

    def settle(self) -> None:
        """Takes back what caches have lost since; calls that were interrupted have ended, too."""
        if not self._within():
            self._abandon(0)
        self.history.settle()
        self.missed.taken_back_tokens = self.history.taken_back

    def _within(self) -> bool:
        """Whether calls that have begun are under way."""
        return not self._frames or is_running(self._frames[0].module, self._thread)

    def _hooks(self, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        def begin(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_ours(called, module):
                self._begin(module, args, kwargs)
            elif self._open and module is self._backbone.module:
                self.missed.elsewhere += 1

        def end(called: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._is_ours(called, module):
                self._end(module, output)

        return Hook(begin), Hook(end)

    def _watch(self, attention: nn.Module) -> Callable[..., None]:
        """Counts forwards that reach the layers although no call has begun; a recomputation for gradients is none."""

        def attends(called: nn.Module, args: tuple[Any, ...]) -> None:
            begun = any(frame.module is self._backbone.module for frame in self._frames)
            if self._is_ours(called, attention) and not begun and torch._C._current_graph_task_id() == -1:
                self.missed.unseen += 1

        return Hook(attends)

    def _is_ours(self, called: nn.Module, module: nn.Module) -> bool:
        return self._open and called is module and get_ident() == self._thread

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(frame.module is module for frame in self._frames) or not self._within():
            self._abandon(0)  # one that was interrupted, and never ended
        frame = Frame(module, arguments(module.forward, args, kwargs), sys.exception())
        self._frames.append(frame)
        if module is self._backbone.module:
            self._open_tap(frame)

    def _open_tap(self, frame: Frame) -> None:
        outermost = self._frames[0]
        # An encoder-decoder's own input_ids are those of its encoder.
        of_encoder = getattr(getattr(outermost.module, "config", None), "is_encoder_decoder", False)
        call = read(frame.said, None if outermost is frame or of_encoder else outermost.said)
        if not call.tokens.numel():
            return
        check_ids(frame.said.get("input_ids"), self._backbone.vocabulary)
        module = outermost.module if call.whole else frame.module
        why_not = partial(self._backbone.why_not, module=module, use_cache=call.use_cache, pre=self._pre)
        images = image_tokens(outermost.module, outermost.said)
        call = replace(call, images=images, counts=lambda: not why_not("counted"))
        prove = partial(_prove, why_not=why_not)
        self.history.settle()
        frame.heard = hear(call, self.history, self._ids, self.missed, prove)
        if frame.heard is None:
            return
        frame.call = call
        frame.batch = CallBatch.of(as_array(call.tokens), frame.heard.pieces, frame.heard.documents, images)
        if self._attention is not None:
            require_room(self._attention, frame.batch)
        frame.picks = self._ahead.draw(frame.batch)
        # A step at which nothing is kept costs nothing.
        if not frame.heard.held or self._moments is not None or any(map(len, frame.picks.values())):
            frame.observer = Observer(
                frame.batch, frame.picks, self._plan, counting=counting_of(self._moments, frame.batch)
            )
            frame.observer.stops = False
            observe, attended = self._observe(frame.observer, call, frame.heard.held), None
            if self._attention is not None:
                where = frame.batch, frame.heard.held, frame.observer, self._transfer
                sections = NamedSections(self._attention.layout.sections, self._sections(frame.batch, frame.heard))
                attended = CallAttention(self._attention, self._backbone.layer_of, *where, sections)
            frame.before = open_tap(observe, pre=self._pre, attended=attended)

    def _sections(self, batch: CallBatch, heard: Heard) -> tuple[Sections | None, ...]:
        """Of each document's tokens so far, and of those of the call; none where nobody weighs sections."""
        if self._attention is None or not self._attention.layout.sections:
            return ()
        found = []
        for one in batch.documents:
            number, position, before = one.example_id, one.first_position, None
            if number not in heard.taken:
                branch = heard.branches.get(number)
                before = self._keeper.sections_until(number if branch is None else branch.parent, position)
            found.append(Sections.joined_if_any([(before, position), (one.sections, one.n_tokens)]))
        return tuple(found)

    def _observe(self, observer: Observer, call: Call, held: int) -> Callable[[Seen], None]:
        """Shows the observer what belongs to the tokens of this call, each layer once."""
        shown: set[nn.Module] = set()

        def observe(seen: Seen) -> None:
            layer = self._backbone.layer_of.get(seen.module)
            if layer is None:
                return
            if seen.module in shown:
                raise CaptureError(
                    f"layer {layer} attends twice in one call: only models that attend once are captured"
                )
            shown.add(seen.module)
            counted = () if self._moments is None else self._moments.kinds_of(layer)
            wanted = dict.fromkeys((*self._plan.kinds.get(layer, ()), *counted))
            fitted: dict[str, Any] = {kind: of_call(getattr(seen, kind), kind, layer, call, held) for kind in wanted}
            with beside(seen.q.device):
                observer(seen._replace(**fitted))

        return observe

    def _end(self, module: nn.Module, output: Any) -> None:
        numbers = [number for number, frame in enumerate(self._frames) if frame.module is module]
        if not numbers:  # another hook failed before ours was called
            return
        self._abandon(numbers[-1] + 1)
        frame = self._frames.pop()
        if frame.observer is not None:
            close_tap(frame.before)
        if sys.exception() is not frame.error:
            self._drop(frame)
            return
        if frame.heard is not None:
            frame.pending.append(self._whole(frame, output))
        if self._frames:
            self._frames[-1].pending += frame.pending
            return
        for whole in frame.pending:
            self._keep(whole)

    def _keep(self, whole: Whole) -> None:
        if whole.heard.taken and whole.call.cache is None:
            self.missed.repeated_rows += whole.rows.batch.repeated
        self._keeper.keep(whole.rows, whole.heard.branches)
        self.history.note(whole.call, whole.cache, whole.heard.rows, whole.heard.branches)

    def _whole(self, frame: Frame, output: Any) -> Whole:
        assert frame.call is not None and frame.heard is not None and frame.batch is not None
        observer, vectors = frame.observer, Vectors()
        if observer is not None:
            if unseen := sorted({layer for layer, _ in self._selection.heads.keys() - observer.vectors.keys()}):
                self._drop(frame)
                run = any(layer in unseen for layer, _ in observer.vectors)
                what = "called no attention that is seen" if run else "were not run"
                raise CaptureError(f"layers {unseen} {what} in this call: name those that are in layers=[...]")
            self._transfer.end_batch()
            vectors = self._transfer.settle(observer.vectors)
        cache = frame.call.cache if frame.call.cache is not None else cache_in(output, CACHES)
        counting = None if observer is None else observer.counting
        return Whole(frame.call, frame.heard, CallRows(frame.batch, frame.picks, vectors, counting), cache)

    def _drop(self, frame: Frame) -> None:
        """Keeps nothing of a call that failed; its ids go to the documents that come next."""
        whole = [one.rows for one in frame.pending]
        if frame.observer is not None and frame.observer.vectors and frame.batch is not None:
            self._transfer.end_batch()
            vectors = self._transfer.settle(frame.observer.vectors)
            whole.append(CallRows(frame.batch, frame.picks, vectors, frame.observer.counting))
        for rows in whole:
            self._keeper.keep_partial(rows)
        of_pending = [number for one in frame.pending for number in one.heard.taken]
        self._ids.give_back([*of_pending, *(frame.heard.taken if frame.heard is not None else ())])
        self.history.forget_the_last()
        self.missed.failed += not frame.blamed
        for outer in self._frames:
            outer.blamed = True

    def _abandon(self, first: int) -> None:
        """Closes calls that began and never ended, since an interrupt passes by the hooks; the innermost first."""
        while len(self._frames) > first:
            frame = self._frames.pop()
            if frame.observer is not None:
                close_tap(frame.before)
            self._drop(frame)


def _prove(claims: Mapping[str, tuple[str, str]], why_not: Callable[[str], str]) -> None:
    for claim, (what, advice) in claims.items():
        if reason := why_not(claim):
            raise CaptureError(f"this call {what}, and in this model {reason}: {advice}")
