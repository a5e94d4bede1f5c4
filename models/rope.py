"""RoPE as a loaded model applies it: its own frequencies, shown to turn q_pre into q and k_pre into k.

What a config says of RoPE leaves much open: which dimensions turn and how they are paired, what a class makes of the
parameters, which layers turn at all. A backbone's modules keep the frequencies as computed (`inv_freq`), or a table of
sines and cosines made from them. Each is tried on what the probe has shown of a layer, with either layout, at the
beginning and at the end of the vectors; the one that gives q and k from q_pre and k_pre is the layer's.

    q[..., f] + i q[..., f + pairs]  =  factor * (q_pre[..., f] + i q_pre[..., f + pairs]) * exp(i inv_freq[f] p)

Where none does, or several do that differ, the layer's RoPE is said to be unknown, and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sniffer.errors import first_line, of_a_device
from sniffer.tap import Seen
from sniffer.types import ROPE_LAYOUTS, LengthClasses, Rope

from .config_keys import rope_of, value_of

BUFFER, FACTOR = "inv_freq", "attention_scaling"
"""How names end: of frequencies, and of the factor that belongs to them."""
ROUNDINGS = 8
"""Times a dtype's rounding, and once more for each position: angles are rounded before they are turned by."""
TABLE = 1e-3
"""By how much sines in a table may differ from those of its frequencies."""


@dataclass(frozen=True)
class Frequencies:
    """Those that some module keeps. `layer_type`: of which layers its name says that they are."""

    inv_freq: tuple[float, ...]
    factor: float
    layer_type: str


def ropes_of(
    module: PreTrainedModel, seen: Sequence[Seen], numbers: Mapping[nn.Module, int], lengths: LengthClasses, why: str
) -> dict[int, Rope]:
    """The RoPE of each layer.

    Args:
        seen: what a probe has shown of the layers, with the pre kinds; positions count from 0.
        numbers: of the layers.
        lengths: which lengths of a text the model treats alike.
        why: the pre kinds are missing; empty where they are there.
    """
    try:
        known, found = list(dict.fromkeys(kept(module))), {}
        for event in seen:
            layer = numbers[event.module]
            told = _told(module.config, layer)
            found[layer] = replace(told, missing=why) if why else _of_layer(event, told, known, lengths)
    except Exception as error:  # of upstream code: any. A run does not need to know.
        if of_a_device(error):
            raise
        reason = f"looking for it failed: {type(error).__name__}: {first_line(error)}"
        found = {number: Rope(missing=reason) for number in numbers.values()}
    return dict(sorted(found.items()))


def kept(module: nn.Module) -> Iterator[Frequencies]:
    """What the parts of a model keep of frequencies, the same more than once."""
    for part in module.modules():
        for name, tensor in (*part.named_buffers(recurse=False), *part.named_parameters(recurse=False)):
            if tensor.device.type == "meta":
                continue
            if name.endswith(BUFFER) and tensor.dim() == 1:
                prefix = name.removesuffix(BUFFER)
                factor = getattr(part, prefix + FACTOR, 1.0)
                yield Frequencies(_numbers(tensor), float(factor), prefix.rstrip("_"))
            elif (rows := _of_table(tensor)) is not None:
                yield Frequencies(rows, 1.0, "")


def _numbers(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.detach().cpu().double().tolist())


def _of_table(tensor: Tensor) -> tuple[float, ...] | None:
    """The frequencies of a table whose row p has the sines of all angles at position p, then their cosines."""
    if tensor.dim() != 2 or tensor.dtype != torch.float32 or tensor.shape[0] < 2 or tensor.shape[1] % 2:
        return None
    pairs = tensor.shape[1] // 2
    if tensor[0, :pairs].any() or not (tensor[0, pairs:] == 1).all():
        return None
    table = tensor.detach().cpu().double()
    speeds = torch.atan2(table[1, :pairs], table[1, pairs:])
    angles = torch.arange(len(table))[:, None] * speeds
    whole = torch.cat([angles.sin(), angles.cos()], dim=1)
    return _numbers(speeds) if (whole - table).abs().max() < TABLE else None


def _told(config: PretrainedConfig, layer: int) -> Rope:
    """What the config says of a layer's RoPE."""
    by_type = rope_of(config)
    if "" in by_type or not by_type:
        return Rope(parameters=dict(by_type.get("", {})))
    types = value_of(config, "layer_types")
    kind = types[layer] if isinstance(types, Sequence) and layer < len(types) else None
    return Rope(parameters=dict(by_type.get(kind, {})), layer_type=kind) if kind in by_type else Rope()


def _of_layer(event: Seen, told: Rope, known: Sequence[Frequencies], lengths: LengthClasses) -> Rope:
    assert event.q_pre is not None and event.k_pre is not None
    pairs = (event.q_pre, event.q), (event.k_pre, event.k)
    if all(torch.equal(before, after) for before, after in pairs):
        return told
    changes = [*lengths.breaks, *([] if lengths.apart_from is None else [lengths.apart_from])]
    until = min(changes) - 1 if changes else None
    if until is not None and until < event.q.shape[2]:
        return replace(told, missing="it may turn positions otherwise in a text of another length")
    shown = [tuple(one.cpu().double().numpy() for one in pair) for pair in pairs]
    rounding = torch.finfo(event.q.dtype).eps * (ROUNDINGS + event.q.shape[2])
    alike = _alike(one for one in _possible(told, known, event.q.shape[3]) if _gives(one, shown, rounding))
    if len(alike) > 1:  # of coarse numbers: a model whose angles are float32 is closer than that, to one of them
        closer = torch.finfo(event.q.dtype).eps * ROUNDINGS + torch.finfo(torch.float32).eps * event.q.shape[2]
        alike = _alike(one for one in alike.values() if _gives(one, shown, closer)) or alike
    if len(alike) == 1:
        return replace(next(iter(alike.values())), until=until)
    why = "several frequencies that differ give" if alike else "no frequencies that it keeps give"
    return replace(told, missing=f"{why} its q from q_pre and its k from k_pre")


def _alike(ropes: Iterable[Rope]) -> dict[tuple[Any, ...], Rope]:
    """Those that turn differently."""
    return {(one.inv_freq, one.attention_factor, one.layout, one.first): one for one in ropes}


def _possible(told: Rope, known: Sequence[Frequencies], dim: int) -> Iterator[Rope]:
    """Each way of turning vectors of so many dimensions; where names tell of which layers frequencies are, theirs."""
    named = [one for one in known if told.layer_type is not None and one.layer_type == told.layer_type]
    for one, layout in product(named or known, ROPE_LAYOUTS):
        rotary = 2 * len(one.inv_freq)
        for first in sorted({0, dim - rotary}) if 0 < rotary <= dim else ():
            yield replace(told, inv_freq=one.inv_freq, attention_factor=one.factor, layout=layout, first=first)


def _gives(rope: Rope, shown: Sequence[Any], rounding: float) -> bool:
    """Whether it turns what was before RoPE into what was after it; a part first, which most fail."""
    part = [(before[:1, :1], after[:1, :1]) for before, after in shown]
    return all(_off(rope, *pair) <= rounding for pairs in (part, shown) for pair in pairs)


def _off(rope: Rope, before: Float[np.ndarray, "*n tokens dim"], after: Float[np.ndarray, "*n tokens dim"]) -> float:
    """The largest difference, over the largest number of its vector."""
    found = rope.turned(before, np.arange(before.shape[-2]))
    size = np.maximum(np.abs(after).max(-1, keepdims=True), np.finfo(np.float32).tiny)
    return float((np.abs(found - after) / size).max())
