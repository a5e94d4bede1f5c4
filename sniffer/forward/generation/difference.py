"""How far the vectors of two captures of the same positions are apart."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sniffer.types import Difference

FAR = 1e100
"""For numbers of which only one side is finite."""


def difference(one: Float[Tensor, "picks values"], other: Float[Tensor, "picks values"], dim: int) -> Difference:
    """Over vectors of `dim` numbers each; the second are what the first are compared with."""
    if not len(other):
        return Difference()
    mine, theirs = (states.double().reshape(-1, dim) for states in (one, other))
    apart = torch.where(mine.isnan() & theirs.isnan(), 0.0, mine - theirs).nan_to_num(nan=FAR, posinf=FAR, neginf=-FAR)
    lengths = theirs.nan_to_num(posinf=0.0, neginf=0.0).norm(dim=1).clamp(min=1e-30)
    return Difference(len(mine), float(apart.abs().max()), float((apart.norm(dim=1) / lengths).max()))
