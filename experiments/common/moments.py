"""Weighted first and second moments of vectors and their positions, for many heads at once.

Most of what is asked of a head (principal components, drift, correlations, explained variance) follows
from a mean, a covariance and the covariance with position. They are summed once and combined freely;
moments of two sets of rows pool into those of their union.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float64, Int

from .rows import LayerVectors


@dataclass(frozen=True)
class Moments:
    """Moments of x (a vector per row) and t (its position). Covariances divide by the total weight."""

    weight: float
    mean: Float64[np.ndarray, "heads dim"]
    covariance: Float64[np.ndarray, "heads dim dim"]
    mean_t: float
    variance_t: float
    covariance_t: Float64[np.ndarray, "heads dim"]

    @property
    def total_variance(self) -> Float64[np.ndarray, " heads"]:
        return np.trace(self.covariance, axis1=1, axis2=2)

    def of_heads(self, places: Sequence[int]) -> Moments:
        """The heads at these places, which may repeat: a key head serves several query heads."""
        chosen = list(places)
        return replace(
            self,
            mean=self.mean[chosen],
            covariance=self.covariance[chosen],
            covariance_t=self.covariance_t[chosen],
        )

    def along(self, axes: Float64[np.ndarray, "heads dim axes"]) -> Moments:
        """Moments of the projections of x onto some axes of each head."""
        return Moments(
            self.weight,
            np.einsum("hd,hda->ha", self.mean, axes),
            axes.swapaxes(1, 2) @ self.covariance @ axes,
            self.mean_t,
            self.variance_t,
            np.einsum("hd,hda->ha", self.covariance_t, axes),
        )

    def correlation_t(self) -> Float64[np.ndarray, "heads dim"]:
        """Pearson's r of each coordinate with position; 0 where either does not vary."""
        variance = np.diagonal(self.covariance, axis1=1, axis2=2)
        return ratio(self.covariance_t, np.sqrt(np.maximum(variance, 0) * self.variance_t))

    def slope_t(self) -> Float64[np.ndarray, "heads dim"]:
        """Least-squares slope of each coordinate on position, per position."""
        return ratio(self.covariance_t, np.float64(self.variance_t))


def moments(
    vectors: Float[np.ndarray, "heads n dim"],
    positions: Int[np.ndarray, " n"] | Float[np.ndarray, " n"],
    weights: Float64[np.ndarray, " n"],
) -> Moments:
    """Weighted moments in float64."""
    total = float(weights.sum())
    share = weights / total
    x = vectors.astype(np.float64)
    # Measured from a row of its own, a coordinate that does not vary is exactly 0, whatever rounding does.
    start = x[:, :1].copy()
    x -= start
    shift = (share @ x)[:, None]
    x -= shift
    t = positions.astype(np.float64)
    mean_t = float(share @ t)
    t -= mean_t
    weighted = x * share[:, None]
    return Moments(
        total,
        (start + shift)[:, 0],
        x.swapaxes(1, 2) @ weighted,
        mean_t,
        float(share @ t**2),
        np.einsum("hnd,n->hd", weighted, t),
    )


def moments_of(rows: LayerVectors) -> Moments:
    return moments(rows.vectors, rows.positions, rows.weights)


def pool(one: Moments, other: Moments) -> Moments:
    """The moments of both sets of rows together (law of total covariance)."""
    total = one.weight + other.weight
    u, v = one.weight / total, other.weight / total
    gap, gap_t = other.mean - one.mean, other.mean_t - one.mean_t
    return Moments(
        total,
        u * one.mean + v * other.mean,
        u * one.covariance + v * other.covariance + u * v * gap[:, :, None] * gap[:, None, :],
        u * one.mean_t + v * other.mean_t,
        u * one.variance_t + v * other.variance_t + u * v * gap_t**2,
        u * one.covariance_t + v * other.covariance_t + u * v * gap * gap_t,
    )


def ratio(above: np.ndarray, below: np.ndarray | np.float64) -> np.ndarray:
    """above / below, and 0 where below is 0."""
    below = np.broadcast_to(below, np.shape(above))
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=below > 0)
