"""The tap: where a tapped model hands over what attention is about to receive.

Derived modelling modules (see models/derive.py) carry one line before each attention call:

    if TAP.observer is not None: TAP.observe(self, query, key, value, ...)

While nothing listens, that is one attribute test per layer. A tap stores nothing, changes nothing and
returns nothing; what it shows are the very tensors that attention then uses. Where the call is to a function, it goes
through `TAP.attending(function, self, __name__)(...)`: the function itself, unless somebody wants to be shown calls. A
tap is its thread's: one is open at a time in a thread, and what other threads run meanwhile passes by it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock, get_ident
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling


class Seen(NamedTuple):
    """What one attention module is about to use; tensors are (batch, heads, seq, dim).

    The fields q, k, v, q_pre, k_pre are named like the kinds, so that `getattr(seen, kind)` is the
    kind's tensor. The pre kinds are None unless the tap asked for them. `scaling` and `sliding_window`
    are what the attention call names, None where it names none.
    """

    module: torch.nn.Module
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_pre: torch.Tensor | None
    k_pre: torch.Tensor | None
    scaling: Any
    sliding_window: Any


class Attended(NamedTuple):
    """One call of attention that is over: what was called and with what, and what it returned.

    `home` is the name of the module in whose code the call stands.
    """

    module: torch.nn.Module
    home: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    returned: Any


class StopForward(Exception):  # noqa: N818 - control flow, never seen by a user
    """Raised by an observer that has all it wants: the rest of the forward need not be computed."""


class Tap(NamedTuple):
    """Who is shown what a thread's models attend with, whether the pre kinds too, and who is shown the calls."""

    observer: Callable[[Seen], None]
    pre: bool
    attended: Callable[[Attended], None] | None = None


class Socket:
    """The one place derived modules look at.

    `observer` is None while no thread listens. It is a plain attribute, and the compiler, which knows no threads,
    is led past the questions for the thread: what it compiles is meant for the tap that was opened last.
    """

    def __init__(self) -> None:
        self.observer: Callable[[Seen], None] | None = None
        self._pre = False
        self._calls = False
        self._last: Tap | None = None
        self._taps: dict[int, Tap] = {}
        self._lock = Lock()

    @property
    def wants_pre(self) -> bool:
        """Whether this thread's tap wants the pre kinds. The answer is the same all through a method that asks
        twice, whatever other threads open and close meanwhile."""
        return self._pre and (is_compiling() or self._wanted_here())

    def observe(
        self,
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_pre: torch.Tensor | None = None,
        k_pre: torch.Tensor | None = None,
        scaling: Any = None,
        sliding_window: Any = None,
    ) -> None:
        observer = self.observer
        if observer is not None:  # another thread may have closed the last tap since this one looked
            observer(Seen(module, q, k, v, q_pre, k_pre, scaling, sliding_window))

    def attending(self, function: Callable[..., Any], module: torch.nn.Module, home: str) -> Callable[..., Any]:
        """What a derived module calls in place of an attention function: that function, or one that shows its call."""
        if not self._calls or is_compiling():
            return function
        tap = self._taps.get(get_ident())
        listener = None if tap is None else tap.attended
        if listener is None:
            return function

        def shown(*arguments: Any, **keywords: Any) -> Any:
            returned = function(*arguments, **keywords)
            listener(Attended(module, home, function, arguments, keywords, returned))
            return returned

        return shown

    def exchange(self, new: Tap | None) -> Tap | None:
        """Puts another tap, or none, in the place of this thread's, and returns what was there."""
        with self._lock:
            before = self._taps.pop(get_ident(), None)
            if new is not None:
                self._taps[get_ident()] = new
            self._last = next(reversed(self._taps.values()), None)
            self._pre = any(tap.pre for tap in self._taps.values())
            self._calls = any(tap.attended is not None for tap in self._taps.values())
            self.observer = self._show if self._taps else None
        return before

    def _show(self, seen: Seen) -> None:
        tap = self._last if is_compiling() else self._taps.get(get_ident())
        if tap is not None:
            tap.observer(seen)

    def _wanted_here(self) -> bool:
        tap = self._taps.get(get_ident())
        return tap is not None and tap.pre


TAP = Socket()


@contextmanager
def tap(
    observer: Callable[[Seen], None],
    *,
    pre: bool = False,
    attended: Callable[[Attended], None] | None = None,
) -> Iterator[None]:
    """Shows every attention input of this thread to `observer` while open; `pre` computes q_pre and k_pre too.

    Args:
        observer: called once per attention module and forward, in the order of execution. It may
            raise StopForward, which ends the forward and is swallowed here.
        pre: whether to compute the pre-RoPE kinds.
        attended: called after each call of attention that goes to a function; it may raise StopForward too.

    Raises:
        RuntimeError: another tap is open in this thread.
    """
    before = TAP.exchange(Tap(observer, pre, attended))
    try:
        if before is not None:
            raise RuntimeError("another tap is open: close it before opening a second one")
        yield
    except StopForward:
        pass
    finally:
        TAP.exchange(before)


@contextmanager
def set_aside() -> Iterator[None]:
    """Closes the tap of this thread, where one is open, for the length of a `with`."""
    before = TAP.exchange(None)
    try:
        yield
    finally:
        TAP.exchange(before)


def as_written() -> AbstractContextManager[Any]:
    """Compiled parts run as they were written for the length of a `with`, so that they can be watched."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
