"""Proof of q_pre and k_pre: they are what attention receives where RoPE is the identity.

The backbone runs a second time over the same tokens, with every rotary function replaced by one that returns what it
was given, and every rotary embedding by angles of zero. Each attention module is given the very inputs that it had the
first time, so that what comes out at its tap differs by its own RoPE alone, layer by layer:

    first time       hidden -> q, k -> RoPE -> tap shows q, k, and q_pre, k_pre by the replayed statements
    second time      hidden -> q, k         -> tap shows q, k: these must be the q_pre, k_pre of the first time

Other threads may be running the same code meanwhile: for them everything stays as it is.

A layer whose pre kinds equal the others says that it has no RoPE at all. Then all its tokens are given one and the same
hidden state, and its vectors must all have one direction: RoPE under a name that we do not know would turn them.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import RLock, get_ident
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sniffer.errors import of_a_device
from sniffer.tap import Seen, StopForward, tap

from .syntax import ROTARY

log = logging.getLogger(__name__)

EMBEDDING = re.compile(r"rotary|rope|rotarypos", re.IGNORECASE)
"""In the names of classes that make the angles of RoPE."""
ABOUT_POSITIONS = re.compile(r"rot|rope|cos|sin|freq|pos")
"""In the names of arguments that are left as they come: they belong to RoPE, not to what is rotated."""
ROUNDING = 8
"""Units in the last place by which two equal computations may differ on a device."""
BEGINNING = 8
"""Tokens that a short convolution over earlier ones may treat otherwise."""
TURNED = 0.05
"""In a vector of length 1, a difference that no rounding makes."""

_ONE_PROOF = RLock()
"""Two threads that replace one function could not both put it back."""

Inputs = dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]
Forward = Callable[[Int[Tensor, "batch seq"]], Any]


def _in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing when another thread comes by."""
    here = get_ident()

    @wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if get_ident() == here else None

    return guarded


@contextmanager
def inputs_of(modules: Iterable[nn.Module]) -> Iterator[Inputs]:
    """Keeps what some modules are called with."""
    found: Inputs = {}

    @_in_this_thread
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[module] = args, kwargs

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield found


def why_unproven(
    forward: Forward,
    ids: Int[Tensor, "batch seq"],
    seen: Sequence[Seen],
    inputs: Inputs,
    backbone: nn.Module,
    names: Mapping[nn.Module, str],
) -> str:
    """Why the pre kinds of a backbone cannot be had, though its taps show some; empty where they are proven.

    Args:
        ids: the tokens of the first run.
        seen: what the taps showed in it, with the pre kinds.
        inputs: what the attention modules were called with in it.
        names: the backbone's modules and their paths in it.
    """
    try:
        found = _first_wrong(forward, ids, seen, inputs, backbone)
    except Exception as error:  # of upstream code: any
        if of_a_device(error):
            raise
        reason = f"without RoPE it fails: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    else:
        if found is None:
            return ""
        module, kind = found
        place = f"{names[module]} ({type(module).__name__})"
        reason = f"{kind} of {place} is not shown to be what its attention would receive without RoPE"
    log.warning("no q_pre and k_pre: %s", reason)
    return reason


def _first_wrong(
    forward: Forward, ids: Int[Tensor, "batch seq"], seen: Sequence[Seen], inputs: Inputs, backbone: nn.Module
) -> tuple[nn.Module, str] | None:
    with without_rope(backbone), given(inputs):
        straight = _shown(forward, ids, {event.module for event in seen})
    for event in seen:
        for kind in ("q", "k"):
            if not _alike(getattr(event, f"{kind}_pre"), getattr(straight.get(event.module), kind, None)):
                return event.module, f"{kind}_pre"
    unturned = [event.module for event in seen if _alike(event.q_pre, event.q)]
    if not unturned:
        return None
    with given({module: inputs[module] for module in unturned if module in inputs}, levelled=True):
        level = _shown(forward, ids, set(unturned))
    found = ((module, kind) for module in unturned for kind in ("q", "k") if not _one_way(getattr(level[module], kind)))
    return next(((module, f"{kind}_pre") for module, kind in found), None)


def _shown(forward: Forward, ids: Int[Tensor, "batch seq"], wanted: set[nn.Module]) -> dict[nn.Module, Seen]:
    """What the taps show of some modules; nothing after them is computed."""
    found: dict[nn.Module, Seen] = {}

    def keep(event: Seen) -> None:
        found[event.module] = event
        if wanted <= found.keys():
            raise StopForward

    with torch.inference_mode(), tap(keep):
        forward(ids)
    return found


@contextmanager
def without_rope(backbone: nn.Module) -> Iterator[None]:
    """RoPE is the identity in all of a backbone's code."""
    with _ONE_PROOF, ExitStack() as undo:
        for owner, name, value in list(_rotary_functions(backbone)):
            function = getattr(value, "__func__", value)
            straight = _identity(function)
            setattr(owner, name, staticmethod(straight) if isinstance(value, staticmethod) else straight)
            undo.callback(setattr, owner, name, value)
        for part in backbone.modules():
            if EMBEDDING.search(type(part).__name__):
                undo.callback(part.register_forward_hook(_in_this_thread(_no_angles)).remove)
        yield


def _rotary_functions(backbone: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and value of every rotary function and method in the modules that a backbone's classes come from."""
    homes = {cls.__module__ for part in backbone.modules() for cls in type(part).__mro__}
    for home in (sys.modules[name] for name in sorted(homes) if name in sys.modules and not _is_library(name)):
        for owner in (home, *(value for value in vars(home).values() if inspect.isclass(value))):
            for name, value in list(vars(owner).items()):
                function = getattr(value, "__func__", value)
                if inspect.isfunction(function) and ROTARY.search(name) and not isinstance(value, ModuleType):
                    yield owner, name, value


def _is_library(name: str) -> bool:
    return name.split(".")[0] in ("torch", "builtins") or (
        name.startswith("transformers.") and not name.startswith("transformers.models.")
    )


def _identity(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns, for each tensor that the function would return, the first one of that shape that it was given."""
    here = get_ident()

    @wraps(function)
    def straight(*args: Any, **kwargs: Any) -> Any:
        if get_ident() != here:
            return function(*args, **kwargs)
        given = [value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        rotated = function(*args, **kwargs)
        kept = []
        for one in rotated if isinstance(rotated, tuple) else (rotated,):
            place = next((n for n, value in enumerate(given) if value.shape == getattr(one, "shape", None)), None)
            kept.append(one if place is None else given.pop(place).to(one.dtype))
        return tuple(kept) if isinstance(rotated, tuple) else kept[0]

    return straight


def _no_angles(module: nn.Module, args: Any, output: Any) -> Any:
    """A rotary embedding's output with every angle at zero, where it is cosines and sines, or complex numbers."""
    if isinstance(output, Tensor) and output.is_complex():
        return torch.ones_like(output)
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(one, Tensor) for one in output)):
        return None
    # At the first position sines are zero.
    sines = [place for place, one in enumerate(output) if one.dim() > 1 and not one[..., :1, :].any()]
    if len(sines) != 1:
        return None
    return tuple(torch.zeros_like(one) if place in sines else torch.ones_like(one) for place, one in enumerate(output))


@contextmanager
def given(inputs: Inputs, *, levelled: bool = False) -> Iterator[None]:
    """Modules are called with the tensors that they were called with before.

    `levelled`: every token with the states of the first one.
    """

    @_in_this_thread
    def give(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        before, named = inputs[module]
        chosen = {name: value for name, value in kwargs.items() if not ABOUT_POSITIONS.search(name)}
        earlier = {name: _earlier(value, named.get(name), levelled) for name, value in chosen.items()}
        return tuple(_earlier(*pair, levelled) for pair in zip(args, before, strict=True)), {**kwargs, **earlier}

    with ExitStack() as hooks:
        for module in inputs:
            hooks.callback(module.register_forward_pre_hook(give, with_kwargs=True).remove)
        yield


def _earlier(now: Any, before: Any, levelled: bool) -> Any:
    if not (isinstance(now, Tensor) and isinstance(before, Tensor) and now.shape == before.shape):
        return now
    states = levelled and before.dim() == 3 and before.is_floating_point()
    return before[:, :1].expand_as(before).contiguous() if states else before


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Equal up to the rounding of a device that computes the same twice."""
    if one is None or other is None or one.shape != other.shape:
        return False
    dtype = one.dtype
    one, other = one.float(), other.float()
    room = ROUNDING * torch.finfo(dtype).eps * one.nan_to_num(posinf=0, neginf=0).abs().max()
    same = ((one - other).abs() <= room) | (one == other) | (one.isnan() & other.isnan())
    return bool(same.all())


def _one_way(states: Float[Tensor, "batch heads seq dim"]) -> bool:
    """Whether the vectors of a head all have one direction, but for the beginning; NaN has none."""
    unit = torch.nn.functional.normalize(states.float(), dim=-1)[:, :, min(BEGINNING, states.shape[2] // 2) :]
    return bool(((unit - unit[:, :, -1:]).abs() <= TURNED).all())
