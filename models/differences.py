"""How far two tensors of one shape are apart, by the measure that the proofs share."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def apart(one: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The differences over the largest finite value of the first.

    Nothing is between equal numbers, infinities and NaN included; where only one of the two is a number, or they are
    infinite each in its way, the difference is infinite.
    """
    one, other = one.float(), other.float()
    same = (one == other) | (one.isnan() & other.isnan())
    scale = one.where(one.isfinite(), 0).abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((one - other).abs() / scale).nan_to_num(nan=torch.inf, posinf=torch.inf).where(~same, 0)
