"""What is seen of a softmax by a mode of torch, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Softmax:
    """What is seen of the first softmax over keys, and of the product that its result enters.

    A constant that a row has been lessened by before softmax, its largest value, is given back: softmax does not mind
    it, but log-sum-exp does.

    Attributes:
        keys: over how many, at least.
        logits: what entered softmax; None before.
        product: what values were summed to; None before.
    """

    def __init__(self, keys: int) -> None:
        self.keys = keys
        self.logits: Tensor | None = None
        self.product: Tensor | None = None
        self._largest: dict[int, tuple[Tensor, Any]] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def look(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Takes notice of one function of torch, with its arguments and what it has returned."""
        if self.logits is not None:
            if self.product is None and name in PRODUCTS and self._is_over_keys(args, kwargs):
                self.product = result
        elif name in ("max", "amax"):
            found = getattr(result, "values", result)
            self._largest[id(found)] = (_first(args, kwargs), found)
        elif name in ("sub", "__sub__") and len(args) == 2:
            whole, largest = args
            of = self._largest.get(id(largest))
            if of is not None and of[0] is whole:
                self._before[id(result)] = (whole, result)
        elif "softmax" in name:
            scores = _first(args, kwargs)
            if isinstance(scores, Tensor) and scores.dim() > 1 and scores.shape[-1] >= self.keys:
                self.logits = self._before.get(id(scores), (scores,))[0]

    def _is_over_keys(self, args: Any, kwargs: Any) -> bool:
        """Whether a factor has a number for each key."""
        assert self.logits is not None
        sizes = (self.keys, self.logits.shape[-1])
        flat = [
            inner for value in (*args, *kwargs.values()) for inner in (value if isinstance(value, tuple) else (value,))
        ]
        return any(isinstance(value, Tensor) and value.dim() > 1 and value.shape[-1] in sizes for value in flat)


PRODUCTS = ("matmul", "__matmul__", "bmm", "einsum")


def _first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("input")


class Watch(TorchFunctionMode):
    """Shows every function of torch that is called to what looks, if anything does."""

    def __init__(self, look: Callable[[str, Any, Any, Any], None] | None = None) -> None:
        super().__init__()
        self.look = look

    def await_softmax(self, keys: int, found: Callable[[Tensor, Tensor], None]) -> None:
        """Looks for the next softmax over keys and the product after it; once both were there, tells of them."""
        softmax = Softmax(keys)

        def look(name: str, args: Any, kwargs: Any, result: Any) -> None:
            softmax.look(name, args, kwargs, result)
            if softmax.logits is not None and softmax.product is not None:
                self.look = None
                found(softmax.logits, softmax.product)

        self.look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.look is not None:
            self.look(getattr(func, "__name__", ""), args, kwargs or {}, result)
        return result
