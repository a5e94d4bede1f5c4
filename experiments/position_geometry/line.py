"""The straight line in position: how much of each dimension it explains, and whether what is left is Gaussian.

Each kind of vector of a head is a line, x = start + slope t, and what is left. Plasticity rests on more: that along the
slope the rest is Gaussian with one variance, and that across it queries are Gaussian. Here that can be looked at.

The Kolmogorov-Smirnov p is that of a Gaussian with the rows' own mean and variance, as was published. Since these were
fitted to the same rows, it comes out too large: a small one says that rows are not Gaussian, a large one says little.

Source: the head metrics and component weights of github.com/viktor-shcherb/attention-plasticity (its README and
docs), which tests at most 64 dimensions across the slope; here it is all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int
from scipy.special import kolmogorov, ndtr

from ..common.moments import Moments, ratio
from ..common.reflection import householder
from ..common.resampling import sums_by
from ..common.rows import LayerVectors

REJECTED = 0.01
"""The p below which a dimension counts as not Gaussian, as was published."""


@dataclass(frozen=True)
class Shape:
    """How far each column is from a Gaussian: skew and excess kurtosis, 0 of one; the largest distance of distribution
    functions, and how probable one as large would be."""

    skew: Float64[np.ndarray, "*heads columns"]
    kurtosis: Float64[np.ndarray, "*heads columns"]
    distance: Float64[np.ndarray, "*heads columns"]
    p: Float64[np.ndarray, "*heads columns"]


@dataclass(frozen=True)
class Line:
    """Of one kind of a layer.

    `r2`: the share of each dimension's variance that the line explains. `weight`: the same as a share of their sum.
    `drift_r2`: of the coordinate along the slope. `along`: what the line leaves of that coordinate, the first column of
    `shape`; the others are those across the slope, in the basis of the published reflection.
    """

    r2: Float64[np.ndarray, "heads dim"]
    drift_r2: Float64[np.ndarray, " heads"]
    along: Float64[np.ndarray, "heads n"]
    shape: Shape

    @property
    def weight(self) -> Float64[np.ndarray, "heads dim"]:
        return ratio(self.r2, self.r2.sum(1, keepdims=True))


def line(rows: LayerVectors, moments: Moments) -> Line:
    """Fits the line of every head, one after the other; `moments` are those of the rows."""
    slope = moments.slope_t()
    turn, rise = householder(slope), np.linalg.norm(slope, axis=1)
    variance = np.diagonal(moments.covariance, axis1=1, axis2=2)
    of_slope = np.einsum("hd,hde,he->h", slope, moments.covariance, slope)
    along, shapes = [], []
    for place, vectors in enumerate(rows.vectors):
        turned = (vectors - moments.mean[place]) @ turn[place]
        turned[:, 0] -= rise[place] * (rows.positions - moments.mean_t)
        along.append(turned[:, 0].copy())
        shapes.append(shape_of(turned, rows.weights))
    names = ("skew", "kurtosis", "distance", "p")
    return Line(
        ratio(moments.covariance_t**2, moments.variance_t * variance),
        ratio(rise**4 * moments.variance_t, of_slope),
        np.stack(along),
        Shape(**{name: np.stack([getattr(one, name) for one in shapes]) for name in names}),
    )


def shape_of(x: Float64[np.ndarray, "n columns"], weights: Float64[np.ndarray, " n"]) -> Shape:
    """Of each column, about its own mean; a column that does not vary has no shape: skew, kurtosis 0 and p 1."""
    share = weights / weights.sum()
    x = x - x[:1]  # So a column that does not vary is 0, whatever rounding does.
    x -= share @ x
    variance = share @ x**2
    z = ratio(x, np.broadcast_to(np.sqrt(variance), x.shape))
    skew, fourth = share @ z**3, share @ z**4
    if np.ptp(weights) == 0:
        z, above = np.sort(z, axis=0), np.cumsum(share)[:, None]
    else:
        order = np.argsort(z, axis=0)
        z, above = np.take_along_axis(z, order, 0), np.cumsum(share[order], axis=0)
    below = np.concatenate([np.zeros_like(above[:1]), above[:-1]])
    expected = ndtr(z)
    distance = np.maximum(above - expected, expected - below).max(0)
    # Of weighted rows, as many count as equal ones would (Kish, 1965); of n, Stephens (1970) has the law.
    root = np.sqrt(1 / (share**2).sum())
    p = kolmogorov((root + 0.12 + 0.11 / root) * distance)
    still = variance == 0
    return Shape(skew, np.where(still, 0, fourth - 3), np.where(still, 0, distance), np.where(still, 1.0, p))


def kurtosis_again(
    along: Float64[np.ndarray, "heads n"],
    weights: Float64[np.ndarray, " n"],
    unit: Int[np.ndarray, " n"],
    counts: Float64[np.ndarray, "draws units"],
) -> Float64[np.ndarray, "draws heads"]:
    """The excess kurtosis along the slope in each draw of units of rows, with the line as it was found."""
    scale = np.sqrt((along**2).mean(1, keepdims=True))
    e = ratio(along, scale + np.zeros_like(along))
    powers = np.stack([e**power for power in range(5)], axis=2) * weights[:, None]
    sums = np.tensordot(counts, sums_by(counts.shape[1], unit, powers), axes=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        m1, m2, m3, m4 = (sums[..., power] / sums[..., 0] for power in range(1, 5))
    variance = m2 - m1**2
    return ratio(m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4, variance**2) - 3


def by_pair(values: Float[np.ndarray, "heads dim"], places: tuple[slice, slice]) -> Float64[np.ndarray, "heads pairs"]:
    """Summed over the two dimensions of each rotary pair (`Rope.places`)."""
    return np.asarray(values[:, places[0]] + values[:, places[1]], dtype=np.float64)
