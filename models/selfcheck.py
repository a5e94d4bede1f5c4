"""Proof at start-up that what is tapped is what attention receives.

A short probe goes through the whole backbone while transformers' own attention functions are wrapped, so
that each call is seen twice: by our tap and, independently, by the wrapper. The q, k and v of both must be
the same objects, once per attention layer. A second probe, with another last token, shows that the
backbone is causal: then right padding needs no mask. The wrappers are taken away again, whatever happens.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from sniffer.errors import UnsupportedModelError
from sniffer.tap import Seen, tap
from sniffer.types import KINDS, LayerGeometry

PROBE_BATCH, PROBE_SEQ = 2, 11
TOLERANCE = 1e-2
"""Relative difference that a changed last token may make to earlier positions; experts are batched anew."""


@dataclass(frozen=True)
class Received:
    """The arguments of one call of an attention function."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor


Forward = Callable[[Int[Tensor, "batch seq"]], Any]


def probe_ids(vocabulary: int, device: torch.device) -> Int[Tensor, "batch seq"]:
    """A few different tokens, away from the special ones that most vocabularies begin with."""
    first = min(16, vocabulary // 2)
    ids = torch.arange(PROBE_BATCH * PROBE_SEQ, device=device) * 7 % max(1, vocabulary - first) + first
    return ids.view(PROBE_BATCH, PROBE_SEQ)


def observe_probe(
    forward: Forward, ids: Int[Tensor, "batch seq"], *, pre: bool
) -> tuple[list[Seen], list[Received], Any]:
    """One tapped forward, and what the attention functions themselves received during it.

    Raises:
        UnsupportedModelError: the forward fails on token ids alone.
    """
    seen: list[Seen] = []
    with torch.inference_mode(), witnessed() as received, tap(seen.append, pre=pre):
        try:
            output = forward(ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of upstream code: any
            reason = str(error).strip().split("\n")[0]
            raise UnsupportedModelError(
                f"it cannot run on token ids alone: {type(error).__name__}: {reason}"
            ) from error
    within = {event.module for event in seen if attends_within_tokens(event)}
    return (
        [event for event in seen if event.module not in within],
        [call for call in received if call.module not in within],
        output,
    )


def attends_within_tokens(event: Seen) -> bool:
    """Whether each token attends to things of its own, such as earlier layers' states: no layer of attention.

    Its sequence is then a batch axis: (batch, seq, queries, dim) with keys alike.
    """
    shapes = [tuple(states.shape) for states in (event.q, event.k)]
    return all(len(s) == 4 and s[:2] == (PROBE_BATCH, PROBE_SEQ) and s[2] != PROBE_SEQ for s in shapes)


def check_taps(seen: list[Seen], received: list[Received], names: Mapping[nn.Module, str]) -> None:
    """Refuses a model whose taps and attention calls disagree.

    Args:
        seen: what the tap saw.
        received: what the wrapped attention functions were given.
        names: the backbone's modules and their paths in it.

    Raises:
        UnsupportedModelError: no tap fired, one fired more than once, tensors are not (batch, heads,
            seq, dim), attention ran untapped, or it received other tensors.
    """
    if not seen:
        raise UnsupportedModelError("no attention of this model is tapped: its modelling code fits no rule")
    for module, count in Counter(event.module for event in seen).items():
        if count > 1:
            raise UnsupportedModelError(
                f"{_named(module, names)} attends {count} times in one forward: looped models are not supported"
            )
    for event in seen:
        _check_layout(event, names)
    calls: dict[nn.Module, list[Received]] = {}
    for call in received:
        if call.module in names:
            calls.setdefault(call.module, []).append(call)
    by_module = {event.module: event for event in seen}
    for module, own in calls.items():
        if module not in by_module:
            raise UnsupportedModelError(f"{_named(module, names)} attends without a tap: its code fits no rule")
        if not any(_same(by_module[module], call) for call in own):
            raise UnsupportedModelError(f"{_named(module, names)} attends with other tensors than its tap shows")


def check_causal(first: Any, forward: Forward, ids: Int[Tensor, "batch seq"], seen: list[Seen]) -> None:
    """Refuses a backbone in which a token changes the vectors of earlier positions.

    Raises:
        UnsupportedModelError: it does, so that right padding would need a mask; or a layer gives no finite number,
            of which nothing can be shown.
    """
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    again, _, second = observe_probe(forward, other, pre=False)
    pairs = [(a.q, b.q, a.module) for a, b in zip(seen, again, strict=True)]
    if isinstance(first, Tensor) and first.dim() == 3:
        pairs.append((first, second, seen[-1].module))
    for number, event in enumerate(seen, 1):
        if not event.q.isfinite().any():
            raise UnsupportedModelError(
                f"{type(event.module).__name__}, attention {number} of {len(seen)}, is given nothing but NaN and "
                "infinity by a short probe, of which nothing can be shown: see that the checkpoint is whole, or load "
                "it in another model.dtype"
            )
    for before, after, module in pairs:
        if _differ(before[..., : PROBE_SEQ - 1, :].float(), after[..., : PROBE_SEQ - 1, :].float()):
            name = type(module).__name__
            raise UnsupportedModelError(
                f"this backbone is not causal: a later token changes {name} at earlier positions, and padding would too"
            )


def _differ(kept: Tensor, new: Tensor) -> bool:
    """Whether two of the same are more than rounding apart; a number that is not finite is to stay so."""
    finite = kept.isfinite()
    if not finite.equal(new.isfinite()):
        return True
    kept, new = kept.where(finite, 0), new.where(finite, 0)
    return bool((kept - new).abs().max() > TOLERANCE * kept.abs().max())


def geometry_of(event: Seen, layer: int, module: str, window: int | None) -> LayerGeometry:
    """Shapes and facts of a layer, from its event; kinds that were not shown are absent."""
    shown = {kind: getattr(event, kind) for kind in KINDS if getattr(event, kind) is not None}
    return LayerGeometry(
        layer=layer,
        module=module,
        heads={kind: states.shape[1] for kind, states in shown.items()},
        dims={kind: states.shape[-1] for kind, states in shown.items()},
        scaling=_number(event.scaling),
        sliding_window=window if event.sliding_window is None else int(event.sliding_window),
    )


def shared_keys(seen: list[Seen], numbers: Mapping[nn.Module, int]) -> dict[int, int]:
    """Layers that attend with the keys of an earlier layer: its number by theirs."""
    owner: dict[tuple[int, torch.Size], int] = {}
    found = {}
    for event in seen:
        first = owner.setdefault((event.k.data_ptr(), event.k.shape), numbers[event.module])
        if first != numbers[event.module]:
            found[numbers[event.module]] = first
    return found


@contextmanager
def witnessed() -> Iterator[list[Received]]:
    """Wraps every attention function of transformers and of the imported families for a while."""
    received: list[Received] = []
    undo: list[Callable[[], None]] = []
    try:
        for interface in _interfaces():
            for name in list(interface.keys()):
                undo.append(_swap_entry(interface, name, _witness(interface[name], received)))
        for module in _modelling_modules():
            eager = getattr(module, "eager_attention_forward", None)
            if eager is not None:
                undo.append(_swap_attribute(module, "eager_attention_forward", _witness(eager, received)))
        yield received
    finally:
        for restore in reversed(undo):
            restore()


def _witness(function: Callable[..., Any], received: list[Received]) -> Callable[..., Any]:
    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        received.append(Received(module, query, key, value))
        return function(module, query, key, value, *args, **kwargs)

    return attention


def _interfaces() -> list[AttentionInterface]:
    """The shared registry, and the own ones that some families keep."""
    own = [getattr(module, "ALL_ATTENTION_FUNCTIONS", None) for module in _modelling_modules()]
    found = {id(i): i for i in [ALL_ATTENTION_FUNCTIONS, *own] if isinstance(i, AttentionInterface)}
    return list(found.values())


def _modelling_modules() -> list[Any]:
    homes = ("transformers.models.", "transformers_modules.")
    return [module for name, module in list(sys.modules.items()) if name.startswith(homes) and module]


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


def _swap_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _check_layout(event: Seen, names: Mapping[nn.Module, str]) -> None:
    for kind in KINDS:
        states = getattr(event, kind)
        if states is None:
            continue
        if states.dim() != 4 or (states.shape[0], states.shape[2]) != (PROBE_BATCH, PROBE_SEQ):
            raise UnsupportedModelError(
                f"{_named(event.module, names)} shows {kind} as {tuple(states.shape)};"
                f" expected ({PROBE_BATCH}, heads, {PROBE_SEQ}, dim): one vector per token"
            )
        if kind.endswith("_pre") and states.shape != getattr(event, kind.removesuffix("_pre")).shape:
            raise UnsupportedModelError(f"{_named(event.module, names)} shows {kind} in another shape than its kind")


def _same(event: Seen, call: Received) -> bool:
    return event.q is call.q and event.k is call.k and event.v is call.v


def _named(module: nn.Module, names: Mapping[nn.Module, str]) -> str:
    return f"{names.get(module, 'a module')} ({type(module).__name__})"


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None
