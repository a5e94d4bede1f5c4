"""RoPE planes: what turns with position in the directions where nothing drifts.

RoPE turns pairs of dimensions by an angle proportional to position, for queries and keys alike. Such a turn
has no linear dependence on position, so that it survives off the drift axis, where pairs of principal components
with equal variance show it as rings. A pair (x, y) is read as the complex number z = x + iy, and the best turn at
an even speed explains a share of it, which is large where RoPE is at work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int

from ..common.moments import ratio
from ..common.turns import best_turn


@dataclass(frozen=True)
class Rings:
    """Pairs of principal components of the complement, largest first.

    `share`: of the complement's variance. `explained`: the share of the pair that its best turn explains.
    `speed`: of that turn, in radians per position, in (-pi, pi]; the sign depends on the sign of the axes.
    `axes`: the components, orthonormal; pair p is columns 2p and 2p + 1, of an odd number the last is in none.
    """

    share: Float64[np.ndarray, "heads pairs"]
    explained: Float64[np.ndarray, "heads pairs"]
    speed: Float64[np.ndarray, "heads pairs"]
    axes: Float64[np.ndarray, "heads dim rest"]


def rings(
    complement: Float64[np.ndarray, "heads dim rest"],
    vectors: Float[np.ndarray, "heads n dim"],
    positions: Int[np.ndarray, " n"],
    weights: Float64[np.ndarray, " n"],
) -> Rings:
    """Finds the turns; `complement` holds orthonormal directions, `vectors` pooled queries and keys."""
    share = weights / weights.sum()
    x = vectors.astype(np.float64) @ complement
    x -= (share @ x)[:, None]
    values, axes = np.linalg.eigh(x.swapaxes(1, 2) @ (x * share[:, None]))
    values, axes = np.maximum(values[:, ::-1], 0), axes[:, :, ::-1]
    pairs = axes.shape[2] // 2
    scores = x @ axes[:, :, : 2 * pairs]
    power = values[:, 0 : 2 * pairs : 2] + values[:, 1 : 2 * pairs : 2]
    peak, speed = best_turn(scores[..., 0::2] + 1j * scores[..., 1::2], positions, share)
    return Rings(ratio(power, values.sum(1, keepdims=True)), ratio(peak, power), speed, complement @ axes)


def drawn_again(
    found: Rings,
    vectors: Float[np.ndarray, "heads n dim"],
    positions: Int[np.ndarray, " n"],
    weights: Float64[np.ndarray, " n"],
    unit: Int[np.ndarray, " n"],
    counts: Float64[np.ndarray, "draws units"],
) -> tuple[Float64[np.ndarray, "draws heads pairs"], Float64[np.ndarray, "draws heads pairs"]]:
    """`share` and `explained` of each draw of units of rows, with the components and speeds as they were found."""
    heads = [
        _of_head(found.axes[place], found.speed[place], vectors[place], positions, weights, unit, counts)
        for place in range(len(vectors))
    ]
    share, explained = (np.stack(parts, axis=1) for parts in zip(*heads, strict=True))
    return share, explained


def _of_head(
    axes: Float64[np.ndarray, "dim rest"],
    speed: Float64[np.ndarray, " pairs"],
    vectors: Float[np.ndarray, "n dim"],
    positions: Int[np.ndarray, " n"],
    weights: Float64[np.ndarray, " n"],
    unit: Int[np.ndarray, " n"],
    counts: Float64[np.ndarray, "draws units"],
) -> tuple[Float64[np.ndarray, "draws pairs"], Float64[np.ndarray, "draws pairs"]]:
    pairs, units = len(speed), counts.shape[1]
    member = np.zeros((units, len(unit)))
    member[unit, np.arange(len(unit))] = weights
    share = counts / np.maximum(counts @ member.sum(1), 1e-300)[:, None]
    x = vectors.astype(np.float64) @ axes
    z = x[:, 0 : 2 * pairs : 2] + 1j * x[:, 1 : 2 * pairs : 2]
    back = np.exp(-1j * positions[:, None] * speed)

    def drawn(values: np.ndarray) -> np.ndarray:
        """The weighted mean of each draw."""
        return np.asarray(share @ (member @ values))

    mean, turned, still = drawn(z), drawn(z * back), drawn(back)
    power = drawn(np.abs(z) ** 2) - np.abs(mean) ** 2
    whole = drawn((x**2).sum(1, keepdims=True)) - (drawn(x) ** 2).sum(1, keepdims=True)
    return ratio(power, whole), ratio(np.abs(turned - mean * still) ** 2, power)
