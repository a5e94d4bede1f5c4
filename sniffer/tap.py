"""The tap: where a tapped model hands over what attention is about to receive.

Derived modelling modules (see models/derive.py) carry one line before each attention call:

    if TAP.observer is not None: TAP.observe(self, query, key, value, ...)

While nothing listens, that is one attribute test per layer. A tap stores nothing, changes nothing and
returns nothing; what it shows are the very tensors that attention then uses. Only one `tap` is open at
a time in a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


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


class StopForward(Exception):  # noqa: N818 - control flow, never seen by a user
    """Raised by an observer that has all it wants: the rest of the forward need not be computed."""


class Socket:
    """The one place derived modules look at."""

    def __init__(self) -> None:
        self.observer: Callable[[Seen], None] | None = None
        self.wants_pre = False

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
        assert self.observer is not None
        self.observer(Seen(module, q, k, v, q_pre, k_pre, scaling, sliding_window))


TAP = Socket()


@contextmanager
def tap(observer: Callable[[Seen], None], *, pre: bool = False) -> Iterator[None]:
    """Shows every attention input to `observer` while open; `pre` computes q_pre and k_pre too.

    Args:
        observer: called once per attention module and forward, in the order of execution. It may
            raise StopForward, which ends the forward and is swallowed here.
        pre: whether to compute the pre-RoPE kinds.

    Raises:
        RuntimeError: another tap is open in this process.
    """
    if TAP.observer is not None:
        raise RuntimeError("another tap is open: close it before opening a second one")
    TAP.observer, TAP.wants_pre = observer, pre
    try:
        yield
    except StopForward:
        pass
    finally:
        TAP.observer, TAP.wants_pre = None, False
