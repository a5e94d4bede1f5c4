"""q_pre and k_pre, which vLLM does not show: q and k of picked tokens, turned back by the layer's own RoPE.

Start-up has shown, in transformers, that this RoPE makes q of q_pre and k of k_pre; and the probe (prove.py) holds what
is turned back against what transformers has before RoPE. Angles are float32, as they are in any model, so that what was
turned forth by an angle is turned back by the same. In a layer without RoPE the vectors are as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Shaped
from torch import Tensor

from sniffer.engine.vllm.steps import Pair
from sniffer.forward.generation.live import ROW, Places
from sniffer.types import KIND, LayerGeometry, Rope, draw_of


def known_before(
    geometry: Sequence[LayerGeometry], ropes: Mapping[int, Rope], missing: str
) -> tuple[tuple[LayerGeometry, ...], str]:
    """The layers with q_pre and k_pre where they can be had, and why they cannot in some.

    Args:
        missing: why the model in transformers shows none itself.
    """
    found = []
    for layer in geometry:
        rope = ropes.get(layer.layer)
        if rope is None or rope.missing:
            missing = missing or f"its RoPE is not known: {'it was not looked at' if rope is None else rope.missing}"
            heads, dims = (
                {kind: value for kind, value in values.items() if not KIND[kind].pre}
                for values in (layer.heads, layer.dims)
            )
            layer = replace(layer, heads=heads, dims=dims)
        found.append(layer)
    return tuple(found), missing


def after_rope(heads: Mapping[Pair, Sequence[int]]) -> dict[Pair, Sequence[int]]:
    """What vLLM is to be asked for: q for q_pre, k for k_pre, and each once. Kinds of one draw share their heads."""
    return {
        draw_of((layer, kind)) if KIND[kind].pre else (layer, kind): those for (layer, kind), those in heads.items()
    }


def before_rope(
    states: Shaped[Tensor, "picks values"], places: Places, dim: int, rope: Rope
) -> Shaped[Tensor, "picks values"]:
    """Vectors of q or k as they were before RoPE, in their own dtype; computed in float32.

    Args:
        states: heads of `dim` numbers side by side.
        places: of each row, row and position.
    """
    if not rope.inv_freq or not len(states):
        return states
    positions = torch.from_numpy(places % ROW).to(states.device, torch.float32)
    angles = positions[:, None] * torch.tensor(rope.inv_freq, dtype=torch.float32, device=states.device)
    cos, sin = (turn(angles)[:, None] / rope.attention_factor for turn in (torch.cos, torch.sin))
    vectors = states.view(len(states), -1, dim).float()
    x, y = (vectors[..., place] for place in rope.places(pre=False))
    found = vectors.clone()
    first, second = rope.places(pre=True)
    found[..., first] = x * cos + y * sin
    found[..., second] = y * cos - x * sin
    return found.flatten(1).to(states.dtype)
