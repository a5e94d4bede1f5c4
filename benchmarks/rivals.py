"""Two ways to come by q and k without a tool, to be compared with: both keep a copy of every position.

Forward hooks on the projections see q and k before RoPE. A wrapped attention function sees what attention
receives, in whatever layout it has there. Neither says where a head ends, which positions to keep or where they go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sniffer.models.loaded import LoadedBackbone
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.measure import Timed, timed

PROJECTIONS = ("q_proj", "k_proj")


class Copies:
    """What was copied, and the time that took."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.spent = Timed()

    def add(self, *states: Tensor) -> None:
        copies, spent = timed(lambda: [one.clone() for one in states])
        self.kept += copies
        self.spent += spent


@contextmanager
def hooked_projections(backbone: LoadedBackbone) -> Iterator[Copies]:
    copies = Copies()

    def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
        copies.add(output)

    projections = [part for name, part in backbone.module.named_modules() if name.endswith(PROJECTIONS)]
    handles = [projection.register_forward_hook(hook) for projection in projections]
    try:
        yield copies
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def wrapped_attention(backbone: LoadedBackbone) -> Iterator[Copies]:
    copies = Copies()
    name = str(backbone.module.config._attn_implementation)
    function = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module: nn.Module, query: Tensor, key: Tensor, *more: Any, **options: Any) -> Any:
        copies.add(query, key)
        return function(module, query, key, *more, **options)

    ALL_ATTENTION_FUNCTIONS[name] = attention  # shadows the registered one
    try:
        yield copies
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


RIVALS: dict[str, Callable[[LoadedBackbone], Any]] = {
    "hooks on q_proj and k_proj (before RoPE)": hooked_projections,
    "wrapped attention functions": wrapped_attention,
}
