"""Vectors by rotary pair: RoPE turns dimensions two by two, each pair f at a speed of its own.

Read as a complex number, the pair of a vector before RoPE is q_f, and RoPE multiplies it by exp(i w_f t). Two
statistics say how a head uses it: the norm E|q_f|, and the concentration

    R_f = |E q_f| / E|q_f|     1: all queries point one way, so the pair serves position; 0: it serves content,

which directional statistics calls the mean resultant length (Mardia and Jupp, 2000; here weighted by length).
Norms do not depend on RoPE, concentration does: hence vectors before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Complex, Float, Float64

from sniffer.errors import RunError
from sniffer.types import Moments

from ..common.moments import ratio
from ..common.rows import LayerVectors
from ..common.turns import best_turn, sharpened

LAYOUTS = ("half", "interleaved")
SAME_LENGTH = 1e-2
"""By how much RoPE may seem to change the length of a pair, relative to it; bfloat16 rounds to 4e-3."""


def rotary_pairs(
    vectors: Float[np.ndarray, "heads n dim"], layout: str, rotary: int
) -> Complex[np.ndarray, "heads n pairs"]:
    """The pairs that RoPE turns, as complex numbers.

    Args:
        layout: "half" pairs dimension i with i + rotary / 2 (Llama and most others); "interleaved" 2i with 2i + 1.
        rotary: how many leading dimensions RoPE turns; those behind are left out.
    """
    x = vectors[..., :rotary].astype(np.float64)
    if layout == "half":
        return x[..., : rotary // 2] + 1j * x[..., rotary // 2 :]
    return x[..., 0::2] + 1j * x[..., 1::2]


def find_layout(before: LayerVectors, after: LayerVectors) -> tuple[str, int]:
    """How RoPE pairs dimensions, seen from the same vectors before and after it.

    Dimensions that never change are not rotary; the right layout is the one that keeps the length of each pair.

    Raises:
        RunError: neither does.
    """
    x, y = (rows.vectors.astype(np.float64) for rows in (before, after))
    changed = np.flatnonzero(np.abs(x - y).max(axis=(0, 1)) > 1e-6 * np.abs(x).max())
    if not len(changed):
        raise RunError(
            f"RoPE changes nothing in layer {before.layer}: it has no rotary pairs; leave it out with layers="
        )
    rotary = int(changed[-1]) + 1 + (int(changed[-1]) + 1) % 2
    # Some models scale all rotated vectors by a constant.
    scale = np.sqrt((x[..., :rotary] ** 2).sum() / (y[..., :rotary] ** 2).sum())
    errors = {}
    for layout in LAYOUTS:
        one, other = np.abs(rotary_pairs(x, layout, rotary)), scale * np.abs(rotary_pairs(y, layout, rotary))
        errors[layout] = float(np.abs(one - other).mean() / one.mean())
    best = min(errors, key=lambda layout: errors[layout])
    if errors[best] > SAME_LENGTH:
        raise RunError(
            f"neither layout of rotary pairs fits layer {before.layer} (lengths change by {errors[best]:.1%}): "
            "set layout=half or layout=interleaved, and rotary=DIMENSIONS"
        )
    return best, rotary


def norms(
    z: Complex[np.ndarray, "heads n pairs"], weights: Float64[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, "heads pairs"], Float64[np.ndarray, "heads pairs"]]:
    """E|z| and the share of E|z|^2 that each pair holds of its head's."""
    share = weights / weights.sum()
    power = np.einsum("n,hnp->hp", share, np.abs(z) ** 2)
    return np.einsum("n,hnp->hp", share, np.abs(z)), ratio(power, power.sum(1, keepdims=True))


def concentration(
    z: Complex[np.ndarray, "heads n pairs"], weights: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, "heads pairs"]:
    """|E z| / E|z|."""
    share = weights / weights.sum()
    return ratio(np.abs(np.einsum("n,hnp->hp", share, z)), np.einsum("n,hnp->hp", share, np.abs(z)))


Numbers = tuple[
    Float64[np.ndarray, "heads pairs"], Float64[np.ndarray, "heads pairs"], Float64[np.ndarray, "heads pairs"]
]
"""Norms, shares of energy, and concentrations."""


def exact_pairs(heads: Sequence[Moments], places: tuple[slice, slice]) -> Numbers | None:
    """The same as `norms` and `concentration`, from sums over all positions.

    Args:
        places: of the first and the second dimension of each pair.
    """
    norm = np.stack([one.pairs for one in heads if one.pairs is not None])
    mean = np.stack([np.hypot(one.mean[places[0]], one.mean[places[1]]) for one in heads])
    squares = np.stack([one.squares / one.n + one.mean**2 for one in heads if one.squares is not None])
    if len(norm) < len(heads) or len(squares) < len(heads):
        return None
    power = squares[:, places[0]] + squares[:, places[1]]
    return norm, ratio(power, power.sum(1, keepdims=True)), ratio(mean, norm)


def speeds(
    before: Complex[np.ndarray, "heads n pairs"], after: Complex[np.ndarray, "heads n pairs"], rows: LayerVectors
) -> Float64[np.ndarray, " pairs"]:
    """w_f in radians per position, measured from what RoPE did to the vectors; all heads share it."""
    share = rows.weights / rows.weights.sum()
    turn = (after * np.conj(before)).sum(0, keepdims=True)
    _, coarse = best_turn(turn, rows.positions, share)
    return sharpened(turn, rows.positions, share, coarse)[0]
