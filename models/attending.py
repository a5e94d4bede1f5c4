"""What attends in a forward, seen from outside the taps: who calls attention, and with which tensors.

Three things are looked at while a probe runs, whoever does them and however they are spelled:

    transformers' attention functions     wrapped (selfcheck.py), each call is told to `received`
    fused attention and softmax           seen by a mode of torch, wherever they are called from
    products                              seen by the same mode; q, k and v of a tap must enter one

A call belongs to the modules whose code is running, which the Python stack knows. So a layer whose forward has been
replaced is found too: it attends, and no tap of its own has shown anything.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from sniffer.tap import Seen
from sniffer.types import MAIN_KINDS

from .sight import Sight, of_sdpa, of_weights

FUSED = re.compile(r"attn|attention|sdpa")
"""In the names of functions and operators that compute attention in one piece."""
SOFTMAX = re.compile(r"softmax")
PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum")


@dataclass(frozen=True)
class Received:
    """The arguments of one call of an attention function.

    `scaling` and `sliding_window` are what it was given under these names, None where it was given none.
    """

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scaling: Any = None
    sliding_window: Any = None


@dataclass(frozen=True)
class Attended:
    """One computation of attention.

    `running` are the modules whose code was at it, innermost first; `what` is the function's name; `keys` what tells
    how many keys it was over.
    """

    running: tuple[nn.Module, ...]
    what: str
    keys: tuple[int, ...]


@dataclass
class _Held:
    """A tap's event until attention has been seen to receive its tensors, with copies of them as they were shown."""

    event: Seen
    copies: dict[str, Tensor]
    missing: set[str] = field(default_factory=lambda: set(MAIN_KINDS))


class Witness(TorchFunctionMode):
    """Watches one forward of a backbone; a mode of torch while it is entered.

    Attributes:
        seen: what the taps have shown, in order.
        calls: what attention functions have received.
        attended: every computation of attention.
        changed: events one of whose tensors was altered between the tap and attention, and which.
        scales: module -> the `scale` that torch's own attention was given in its code.
        sights: which computations of attention let a query see later keys, as far as they say.
    """

    def __init__(self, modules: Collection[nn.Module]) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.calls: list[Received] = []
        self.attended: list[Attended] = []
        self.changed: list[tuple[Seen, str]] = []
        self.scales: dict[nn.Module, Any] = {}
        self.sights: list[Sight] = []
        self._modules = modules
        self._thread = get_ident()
        self._held: dict[nn.Module, _Held] = {}
        self._early: dict[nn.Module, tuple[Received, dict[str, Tensor]]] = {}

    @property
    def unused(self) -> list[tuple[Seen, str]]:
        """Events one of whose tensors no attention function, fused attention or product has received, and which."""
        return [(held.event, kind) for held in self._held.values() for kind in MAIN_KINDS if kind in held.missing]

    def show(self, event: Seen) -> None:
        """What the tap is given as its observer."""
        if get_ident() != self._thread:  # somebody else's forward
            return
        self.seen.append(event)
        # A tap may also stand after the call.
        call, copies = self._early.pop(event.module, (None, {}))
        self._held[event.module] = _Held(event, copies or _copies(event))
        if call is not None:
            self._meet(event.module, call)

    def receive(self, call: Received) -> None:
        """What the wrapped attention functions tell, before they do their work."""
        if get_ident() != self._thread:
            return
        self.calls.append(call)
        self.attended.append(Attended(self._running(), "an attention function", (call.k.shape[-2],)))
        if call.module in self._held:
            self._meet(call.module, call)
        else:
            self._early[call.module] = call, _copies(call)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Looks away for a while, so that a compiler meets no mode of ours."""
        if _get_current_function_mode() is not self:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if FUSED.search(name):
            self._fused(name, args, kwargs or {})
        elif SOFTMAX.search(name):
            self._softmax(name, args, kwargs or {})
        elif self._held and name.split(".")[0] in PRODUCTS:
            self._product(args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if SOFTMAX.search(name):
            self.notice(of_weights(self._running(), result))
        return result

    def notice(self, sight: Sight | None) -> None:
        """Takes down what a computation of attention says of later keys, where it says something."""
        if sight is not None and get_ident() == self._thread:
            self.sights.append(sight)

    def _fused(self, name: str, args: Any, kwargs: Any) -> None:
        tensors = _tensors((*args, *kwargs.values()))
        if len(tensors) >= 3:
            running = self._running()
            self.attended.append(Attended(running, name, _keys(name, tensors[1])))
            self.scales |= dict.fromkeys(running, kwargs.get("scale"))
            if name == "scaled_dot_product_attention":
                self.notice(of_sdpa(running, *args, **kwargs))
            self._enter(tensors)

    def _softmax(self, name: str, args: Any, kwargs: Any) -> None:
        scores, axis = args[0] if args else kwargs.get("input"), kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(scores, Tensor) and scores.dim() > 1:
            over = scores.shape[axis if isinstance(axis, int) else -1]
            self.attended.append(Attended(self._running(), name, (over,)))

    def _product(self, args: Any, kwargs: Any) -> None:
        self._enter(_tensors((*args, *kwargs.values())))

    def _enter(self, factors: list[Tensor]) -> None:
        """Ticks off what the running modules' taps have shown, as it is or as a view."""
        for module in [one for one in self._running() if one in self._held]:
            held = self._held[module]
            for kind in sorted(held.missing):
                shown = getattr(held.event, kind)
                if any(_is(factor, shown) for factor in factors):
                    self._tick(held, kind)

    def _meet(self, module: nn.Module, call: Received) -> None:
        """An attention function and the tap are about the same module: their objects must be the same."""
        held = self._held[module]
        for kind in MAIN_KINDS:
            if getattr(held.event, kind) is getattr(call, kind):
                self._tick(held, kind)

    def _tick(self, held: _Held, kind: str) -> None:
        held.missing.discard(kind)
        if not same_values(held.copies.pop(kind), getattr(held.event, kind)):
            self.changed.append((held.event, kind))
        if not held.missing:
            del self._held[held.event.module]

    def _running(self) -> tuple[nn.Module, ...]:
        """The backbone's modules whose code is on the Python stack, innermost first."""
        found: dict[nn.Module, None] = {}
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(first, nn.Module) and first in self._modules:
                found[first] = None
            frame = frame.f_back  # type: ignore[assignment]
        return tuple(found)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN being the same as NaN."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _copies(shown: Seen | Received) -> dict[str, Tensor]:
    return {kind: getattr(shown, kind).clone() for kind in MAIN_KINDS}


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among the arguments of a call, those in lists and tuples too."""
    flat = [inner for value in values for inner in (value if isinstance(value, (list, tuple)) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]


def _is(factor: Tensor, shown: Tensor) -> bool:
    """Whether a factor is what was shown: the same memory, or the same numbers in a wider type."""
    if factor.numel() != shown.numel():
        return False
    if factor.untyped_storage().data_ptr() == shown.untyped_storage().data_ptr():
        return True
    if factor.dtype == shown.dtype or factor.dim() < 2:
        return False
    wider = shown.to(factor.dtype)
    return any(same_values(one.reshape(shown.shape), wider) for one in (factor, factor.transpose(-1, -2)))


def _keys(name: str, k: Tensor) -> tuple[int, ...]:
    """Torch's own function has its keys in the last axis but one; others have layouts of their own."""
    return (k.shape[-2],) if name == "scaled_dot_product_attention" else tuple(k.shape)
