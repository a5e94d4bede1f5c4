"""Whether a computation of attention lets a query see later keys, read off what it is given.

    scaled_dot_product_attention(q, k, v, attn_mask, is_causal)    the mask, or the flag: exact, whatever the weights
    softmax(scores)                                                what later keys are given is zero, or is not
    flash attention                                                the flag alone; its kernels look at no mask of ours
    flex attention                                                 the rule of its block mask, asked for each pair

Only attention of a text over itself tells something: as many queries as keys, one of each per token.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn


@dataclass(frozen=True)
class Sight:
    """What one computation of attention over a text says.

    Attributes:
        running: the modules whose code was at it, innermost first.
        tokens: queries, and as many keys.
        later: whether a query is given a later key.
        certain: whether that is all there is to it; a softmax may still be followed by a mask.
    """

    running: tuple[nn.Module, ...]
    tokens: int
    later: bool
    certain: bool = True


def of_sdpa(
    running: tuple[nn.Module, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Sight | None:
    """Of a call of torch's own attention; None where it is not over one text."""
    tokens = query.shape[-2]
    if tokens != key.shape[-2]:
        return None
    if attn_mask is None:
        return Sight(running, tokens, not is_causal)
    return None if attn_mask.shape[-2:] != (tokens, tokens) else Sight(running, tokens, _lets_by(attn_mask))


def of_weights(running: tuple[nn.Module, ...], weights: Any) -> Sight | None:
    """Of the result of a softmax; None where it is not (batch, heads, tokens, tokens)."""
    if not isinstance(weights, Tensor) or weights.dim() != 4 or weights.shape[-1] != weights.shape[-2]:
        return None
    # A comparison with NaN is false: it counts as nothing, and NaN is looked at elsewhere.
    return Sight(running, weights.shape[-1], bool((weights.triu(1).abs() > 0).any()), certain=False)


def of_arguments(name: str, module: nn.Module, query: Tensor, key: Tensor, named: Mapping[str, Any]) -> Sight | None:
    """Of one of transformers' attention functions whose kernel is out of sight; None where they do not say."""
    tokens = query.shape[-2]
    if tokens != key.shape[-2] or tokens < 2:
        return None
    mask = named.get("attention_mask")
    if "flex" in name:
        return Sight((module,), tokens, _block_lets_by(mask, tokens)) if _is_block_mask(mask) else None
    if "flash" in name:
        said = named.get("is_causal")
        causal = said if said is not None else getattr(module, "is_causal", None)
        return None if causal is None else Sight((module,), tokens, not causal)
    return None


def _lets_by(mask: Shaped[Tensor, "*batch tokens tokens"]) -> bool:
    """Whether a mask, of truths or of numbers to add, leaves a later key any weight."""
    if mask.dtype == torch.bool:
        return bool(mask.triu(1).any())
    # What is added decides where it is all that the scores differ by, as they do not by a mask's thousands.
    return bool((mask.float().softmax(-1).triu(1) > 0).any())


def _is_block_mask(mask: Any) -> bool:
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return flex is not None and isinstance(mask, flex.BlockMask)


def _block_lets_by(mask: Any, tokens: int) -> bool:
    flex = sys.modules["torch.nn.attention.flex_attention"]
    device = mask.kv_num_blocks.device
    rows = mask.kv_num_blocks.shape[0]
    allowed: Tensor = flex.create_mask(mask.mask_mod, rows, 1, tokens, tokens, device=str(device))
    return _lets_by(allowed)
