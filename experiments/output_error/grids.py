"""A grid whose levels are not even: each line of numbers has a scale, all lines share the levels, outliers stay.

What KVQuant does (Hooper and others, 2024, arXiv 2401.18079): a line is one channel of the keys before RoPE, or one
token of the values. Its largest and smallest numbers are kept as they are, a per cent in all; what lies between is
scaled to [-1, 1], and rounded to the nearest of 2^bits levels, which are the centres that k-means finds among the
scaled numbers of a layer (Lloyd, 1982). Two things are left out: numbers weigh alike here, while KVQuant weighs them by
gradients; and scales and levels come from the very numbers that are rounded, not from another text. Its first token,
which it keeps too, is its caller's.

Even levels within groups, as KIVI has them, are those of `quantisation.core.quantised`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Float64

STEPS = 50
"""Of k-means at most; it ends before where nothing moves any more."""
MOST = 50_000
"""Numbers that levels are found from, drawn among all."""
CELLS = 1 << 14
"""Into which [-1, 1] is cut; all numbers in one get the level that is nearest to its middle."""


def uneven(
    x: Float[np.ndarray, "lines numbers"], bits: Sequence[int], kept: float
) -> Iterator[Float[np.ndarray, "lines numbers"]]:
    """x as it comes back, for each width in turn.

    Args:
        kept: the share of each line's numbers that stay as they are, half at either end.
    """
    low = np.quantile(x, kept / 2, axis=1, keepdims=True, method="higher")
    high = np.quantile(x, 1 - kept / 2, axis=1, keepdims=True, method="lower")
    middle, half = (high + low) / 2, (high - low) / 2
    scaled = np.divide(x - middle, half, out=np.zeros_like(x), where=half > 0)
    inside = (x >= low) & (x <= high)
    few = np.random.default_rng(0).integers(x.size, size=min(MOST, x.size))
    some = scaled.ravel()[few][inside.ravel()[few]]
    cell = ((scaled.clip(-1, 1) + 1) * (CELLS / 2)).clip(0, CELLS - 1).astype(np.int32)
    places = (np.arange(CELLS) + 0.5) * (2 / CELLS) - 1
    for width in bits:
        centres = levels(some, width)
        nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, places)].astype(x.dtype)
        yield np.where(inside, middle + half * nearest[cell], x)


def levels(numbers: Float[np.ndarray, " n"], bits: int) -> Float64[np.ndarray, " levels"]:
    """Centres of 2^bits clusters, ascending: k-means in one dimension, from quantiles on."""
    ordered = np.sort(numbers.astype(np.float64))
    sums = np.concatenate([[0.0], ordered.cumsum()])
    count = 1 << bits
    centres = np.quantile(ordered, (np.arange(count) + 0.5) / count)
    for _ in range(STEPS):
        ends = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate([[0], ends, [len(ordered)]])
        sizes = np.diff(ends)
        means = np.divide(np.diff(sums[ends]), sizes, out=centres.copy(), where=sizes > 0)
        if np.allclose(means, centres, rtol=0, atol=1e-6):
            return means
        centres = means
    return centres
