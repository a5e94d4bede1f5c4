"""What attention is really called with: its functions are wrapped while a probe runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .attending import Received, Witness
from .sight import of_arguments

COMPILED = "flex"
"""In the names of attention functions that compile themselves: no mode of torch may be open around them."""


@contextmanager
def witnessed(witness: Witness | None = None) -> Iterator[list[Received]]:
    """Wraps every attention function of transformers and of the imported families for a while; yields their calls."""
    witness = witness or Witness(())
    undo: list[Callable[[], None]] = []
    try:
        for interface in _interfaces():
            for name in list(interface.keys()):
                undo.append(_swap_entry(interface, name, _told(name, interface[name], witness)))
        for module in _modelling_modules():
            eager = vars(module).get("eager_attention_forward")
            if eager is not None:
                undo.append(swap_attribute(module, "eager_attention_forward", _told("eager", eager, witness)))
        yield witness.calls
    finally:
        for restore in reversed(undo):
            restore()


def _told(name: str, function: Callable[..., Any], witness: Witness) -> Callable[..., Any]:
    """An attention function that tells the witness what it is given."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(_parameters(function)[4:], args, strict=False)), **kwargs}
        scaling, window = named.get("scaling"), named.get("sliding_window")
        witness.receive(Received(module, query, key, value, scaling, window))
        witness.notice(of_arguments(name, module, query, key, named))
        with witness.aside() if COMPILED in name else nullcontext():
            return function(module, query, key, value, *args, **kwargs)

    return attention


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _interfaces() -> list[AttentionInterface]:
    """The shared registry, and the own ones that some families keep."""
    own = [vars(module).get("ALL_ATTENTION_FUNCTIONS") for module in _modelling_modules()]
    found = {id(i): i for i in [ALL_ATTENTION_FUNCTIONS, *own] if isinstance(i, AttentionInterface)}
    return list(found.values())


def _modelling_modules() -> list[Any]:
    """To be looked at through `vars`: 5.17 has aliases that answer getattr by an import, which may fail."""
    homes = ("transformers.models.", "transformers_modules.")
    return [module for name, module in sys.modules.copy().items() if name.startswith(homes) and module]


def _swap_entry(interface: AttentionInterface, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Shadows one entry in an interface's own mapping, and returns how to undo that."""
    local = interface._local_mapping
    had, before = name in local, local.get(name)
    local[name] = wrapper

    def restore() -> None:
        if had:
            local[name] = before
        else:
            local.pop(name, None)

    return restore


def swap_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Gives an attribute another value; what is returned puts the one before back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)
