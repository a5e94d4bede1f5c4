"""From calls of a model to rows that are kept: the hooks by which sniff (sniffing.py) listens.

    a call begins      its arguments become pieces (call.py), their picks are drawn, the tap opens
    a layer attends    the observer gathers
    the call ends      the rows are whole, and wait
    the outermost      they are kept; if anything in it failed, nothing is, and the ids go to the next call

A model of several parts has a call within a call; all of them are listened to. The listener is its thread's: what other
threads do with the model meanwhile is counted, and otherwise left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sniffer.errors import CaptureError
from sniffer.forward.observer import Observer, Wanted, draw
from sniffer.forward.selection import Selection
from sniffer.forward.transfer import Vectors, transfer_for
from sniffer.notebook.batch import CallBatch, check_ids
from sniffer.notebook.call import Arguments, Call, arguments, claims, pieces_of, read
from sniffer.notebook.example_ids import ExampleIds
from sniffer.notebook.history import CallHistory, as_array
from sniffer.notebook.missed import Missed
from sniffer.sampler import Picker
from sniffer.tap import TAP, Seen, Tap
from sniffer.types import Backbone, Picks, by_number


class Attached(Backbone, Protocol):
    """A tapped backbone inside a model that its user calls."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def calls(self) -> Sequence[nn.Module]:
        """The modules by which it may be called, the outermost first, itself last."""

    def why_not(self, claim: str, module: nn.Module, use_cache: Any = None) -> str:
        """Why calls of `module` that make a claim cannot be captured; empty where the model has proven it."""


@dataclass(frozen=True)
class CallRows:
    """The rows of one call: what the accumulator takes."""

    batch: CallBatch
    picks: Mapping[tuple[int, str], Picks]
    vectors: Vectors


@dataclass
class _Frame:
    """A call under way."""

    module: nn.Module
    said: Arguments
    error: BaseException | None
    """What was being handled when it began; another one at its end is its own."""
    pending: list[CallRows] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    observer: Observer | None = None
    before: Tap | None = None
    blamed: bool = False
    """Whether a call within it has failed, and is counted."""


class _Hook:
    """A copy of the model takes its hooks along, but not all that is captured; a model that is saved leaves them."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, *arguments: Any) -> None:
        self._act(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _Hook, (_nothing,)


def _nothing(*_: Any) -> None: ...


class Listener:
    """Hears every call of a model.

    Args:
        keep: is given the rows of each call that went well.
        missed: counts the rest.
    """

    def __init__(
        self,
        backbone: Attached,
        selection: Selection,
        picker: Picker,
        ids: ExampleIds,
        keep: Callable[[CallRows], None],
        missed: Missed,
    ) -> None:
        self.missed = missed
        self._backbone = backbone
        self._selection = selection
        self._picker = picker
        self._ids = ids
        self._keep = keep
        self._geometry = by_number(backbone.geometry)
        self._transfer = transfer_for(backbone.device)
        self._plan = Wanted(selection, self._geometry, backbone.layer_of, self._transfer, backbone.device)
        self._pre = selection.wants_pre
        self._thread = get_ident()
        self._frames: list[_Frame] = []
        self._history = CallHistory()
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

    def _hooks(self, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        def begin(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_ours(called, module):
                self._begin(module, args, kwargs)
            elif self._open and module is self._backbone.module:
                self.missed.elsewhere += 1

        def end(called: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._is_ours(called, module):
                self._end(module)

        return _Hook(begin), _Hook(end)

    def _watch(self, attention: nn.Module) -> Callable[..., None]:
        """Counts forwards that reach the layers although no call has begun; a recomputation for gradients is none."""

        def attends(called: nn.Module, args: tuple[Any, ...]) -> None:
            begun = any(frame.module is self._backbone.module for frame in self._frames)
            if self._is_ours(called, attention) and not begun and torch._C._current_graph_task_id() == -1:
                self.missed.unseen += 1

        return _Hook(attends)

    def _is_ours(self, called: nn.Module, module: nn.Module) -> bool:
        return self._open and called is module and get_ident() == self._thread

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(frame.module is module for frame in self._frames):  # one that was interrupted, and never ended
            self._abandon(0)
        frame = _Frame(module, arguments(module.forward, args, kwargs), sys.exception())
        self._frames.append(frame)
        if module is self._backbone.module:
            self._open_tap(frame)

    def _open_tap(self, frame: _Frame) -> None:
        outermost = self._frames[0]
        # An encoder-decoder's own input_ids are those of its encoder.
        of_encoder = getattr(getattr(outermost.module, "config", None), "is_encoder_decoder", False)
        call = read(frame.said, None if outermost is frame or of_encoder else outermost.said)
        if not call.tokens.numel() or self._goes_on(call):
            return
        check_ids(frame.said.get("input_ids"), self._backbone.vocabulary)
        pieces = pieces_of(call)
        for claim, (what, advice) in claims(call, pieces).items():
            module = outermost.module if call.whole else frame.module
            if reason := self._backbone.why_not(claim, module, call.use_cache):
                raise CaptureError(f"this call {what}, and in this model {reason}: {advice}")
        frame.ids = self._ids.take(len(pieces))
        batch = CallBatch.of(as_array(call.tokens), pieces, frame.ids)
        frame.observer = Observer(batch, draw(self._picker, self._selection, batch), self._plan)
        frame.observer.stops = False
        frame.before = TAP.exchange(Tap(self._observe(frame.observer, call), self._pre))

    def _goes_on(self, call: Call) -> bool:
        """Whether a call goes on with an earlier one, and is counted as passed over."""
        cached = self._history.has_cache_of_earlier(call)
        repeats = not cached and self._history.repeats_the_last(call)
        if repeats and self._ids.given:
            raise CaptureError(
                "this call is the one before it and a token more, as generate(use_cache=False) makes them: whether it "
                "is a document cannot be known; leave example_ids out, or generate with a cache"
            )
        self.missed.taken_back_tokens = self._history.taken_back
        if cached or repeats:
            self.missed.passed_over += 1
            self.missed.passed_over_tokens += call.shape[0] * (call.shape[1] if cached else 1)
        return cached or repeats

    def _observe(self, observer: Observer, call: Call) -> Callable[[Seen], None]:
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
            wanted = self._plan.kinds.get(layer, ())
            fitted: dict[str, Any] = {kind: _fitted(getattr(seen, kind), kind, layer, call) for kind in wanted}
            with torch.no_grad():
                observer(seen._replace(**fitted))

        return observe

    def _end(self, module: nn.Module) -> None:
        numbers = [number for number, frame in enumerate(self._frames) if frame.module is module]
        if not numbers:  # another hook failed before ours was called
            return
        self._abandon(numbers[-1] + 1)
        frame = self._frames.pop()
        if frame.observer is not None:
            TAP.exchange(frame.before)
        if sys.exception() is not frame.error:
            self._drop(frame)
            return
        if frame.observer is not None:
            frame.pending.append(self._whole(frame))
        if self._frames:
            self._frames[-1].pending += frame.pending
            return
        for kept in frame.pending:
            self.missed.repeated_rows += kept.batch.repeated
            self._keep(kept)

    def _whole(self, frame: _Frame) -> CallRows:
        observer = frame.observer
        assert observer is not None
        if unseen := sorted({layer for layer, _ in self._selection.heads.keys() - observer.vectors.keys()}):
            self._drop(frame)
            raise CaptureError(f"layers {unseen} were not run in this call: name those that are in layers=[...]")
        self._transfer.end_batch()
        return CallRows(observer.batch, observer.picks, self._transfer.settle(observer.vectors))  # type: ignore[arg-type]

    def _drop(self, frame: _Frame) -> None:
        """Keeps nothing of a call that failed; its ids go to the documents that come next."""
        of_pending = [document.example_id for kept in frame.pending for document in kept.batch.documents]
        self._ids.give_back([*of_pending, *frame.ids])
        self._history.forget_the_last()
        self.missed.failed += not frame.blamed
        for outer in self._frames:
            outer.blamed = True

    def _abandon(self, first: int) -> None:
        """Closes calls that began and never ended, since an interrupt passes by the hooks; the innermost first."""
        while len(self._frames) > first:
            frame = self._frames.pop()
            if frame.observer is not None:
                TAP.exchange(frame.before)
            self._drop(frame)


def _fitted(states: Tensor, kind: str, layer: int, call: Call) -> Tensor:
    """The vectors of this call's tokens, where a cache shows room for more behind them.

    Raises:
        CaptureError: they are those of other tokens, too.
    """
    batch, seq = call.shape
    if (states.shape[0], states.shape[2]) == (batch, seq):
        return states
    # Static caches are as long as they may become, and are filled from the start.
    known = type(call.cache).__module__.startswith("transformers.")
    if states.shape[0] == batch and states.shape[2] > seq and known:
        return states[:, :, :seq]
    raise CaptureError(
        f"layer {layer} shows {kind} of {states.shape[0]} x {states.shape[2]} tokens in a call of {batch} x {seq}: "
        "leave the cache out"
    )
