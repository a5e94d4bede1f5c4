"""The planar rotation model: the two directions of a head's space that make its position bias.

Axis a is the direction of drift, a = Cov(x, t) / |Cov(x, t)| over pooled queries and keys. It holds all linear
dependence on position: for every v orthogonal to a, Cov(v.x, t) = |Cov(x, t)| v.a = 0. Axis b separates
queries from keys: the difference of their means, made orthogonal to a. With the other dim - 2 directions
they form an orthonormal basis, in which q.k is the sum of a planar part and of the rest. The planar part is

    q_a k_a + q_b k_b,   q_a = mu_q + alpha_q i,   k_a = mu_k + alpha_k j   for query i and key j,

whose term in the key's position alone is mu_q alpha_k j, at positions counted from their mean. That is
`bias_strength`: positive, later keys are favoured whatever they hold.

Source: the planar rotation analysis of github.com/viktor-shcherb/qk-rotation. Its axis b is the mean difference in the
chapter "Methodology" of github.com/viktor-shcherb/msc_thesis, as the model's constant term asks, and here; in the notes
and figures beside that it is the leading eigenvector of the differences q - k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from ..common.moments import Moments, pool, ratio


@dataclass(frozen=True)
class Plane:
    """The model of each head.

    `mu_q_a` and so on are uncentred means on an axis; `alpha_q` slopes on axis a per position; `r_q`, `r_k`
    Pearson's r of position with axis a. `variance_a`, `variance_b`: shares of the pooled variance.
    `pooled`: the moments of queries and keys together, that it was fitted to.
    """

    a: Float64[np.ndarray, "heads dim"]
    b: Float64[np.ndarray, "heads dim"]
    r_q: Float64[np.ndarray, " heads"]
    r_k: Float64[np.ndarray, " heads"]
    alpha_q: Float64[np.ndarray, " heads"]
    alpha_k: Float64[np.ndarray, " heads"]
    mu_q_a: Float64[np.ndarray, " heads"]
    mu_k_a: Float64[np.ndarray, " heads"]
    mu_q_b: Float64[np.ndarray, " heads"]
    mu_k_b: Float64[np.ndarray, " heads"]
    variance_a: Float64[np.ndarray, " heads"]
    variance_b: Float64[np.ndarray, " heads"]
    pooled: Moments

    @property
    def residual_r(self) -> Float64[np.ndarray, " heads"]:
        """The largest |r| of position with any direction of the basis but a: 0 up to rounding."""
        return np.abs(self.pooled.along(basis(self.a, self.b)).correlation_t()[:, 1:]).max(1)

    @property
    def bias_strength(self) -> Float64[np.ndarray, " heads"]:
        """Change of q.k per position of the key; times the head's scaling, of the logit."""
        return self.mu_q_a * self.alpha_k


def plane(queries: Moments, keys: Moments) -> Plane:
    """Fits the model to the moments of a layer's queries and of the keys they attend with."""
    pooled = pool(queries, keys)
    a = unit(pooled.covariance_t)
    gap = queries.mean - keys.mean
    b = unit(gap - (gap * a).sum(1, keepdims=True) * a)
    axes = np.stack([a, b], axis=2)
    q, k, both = (side.along(axes) for side in (queries, keys, pooled))
    shares = ratio(np.diagonal(both.covariance, axis1=1, axis2=2), pooled.total_variance[:, None])
    return Plane(
        a=a,
        b=b,
        r_q=q.correlation_t()[:, 0],
        r_k=k.correlation_t()[:, 0],
        alpha_q=q.slope_t()[:, 0],
        alpha_k=k.slope_t()[:, 0],
        mu_q_a=q.mean[:, 0],
        mu_k_a=k.mean[:, 0],
        mu_q_b=q.mean[:, 1],
        mu_k_b=k.mean[:, 1],
        variance_a=shares[:, 0],
        variance_b=shares[:, 1],
        pooled=pooled,
    )


def separation_strength(
    queries: Moments, keys: Moments, b: Float64[np.ndarray, "heads dim"]
) -> Float64[np.ndarray, " heads"]:
    """E[(b.d)^2] / E|d|^2 of the difference d = q - k of any query and any key: how much of it lies along b."""
    squares = _squared_differences(queries, keys)
    return ratio(np.einsum("hd,hde,he->h", b, squares, b), np.trace(squares, axis1=1, axis2=2))


def largest_separation(
    queries: Moments, keys: Moments, a: Float64[np.ndarray, "heads dim"]
) -> Float64[np.ndarray, " heads"]:
    """The most that `separation_strength` is along any direction orthogonal to a: axis b of the notes."""
    squares = _squared_differences(queries, keys)
    off = np.eye(a.shape[1]) - a[:, :, None] * a[:, None, :]
    return ratio(np.linalg.eigvalsh(off @ squares @ off)[:, -1], np.trace(squares, axis1=1, axis2=2))


def _squared_differences(queries: Moments, keys: Moments) -> Float64[np.ndarray, "heads dim dim"]:
    """E[(q - k)(q - k)'], where query and key are drawn apart from each other."""
    gap = queries.mean - keys.mean
    return queries.covariance + keys.covariance + gap[:, :, None] * gap[:, None, :]


def unit(vectors: Float64[np.ndarray, "heads dim"]) -> Float64[np.ndarray, "heads dim"]:
    """Each vector at length 1; one without a direction becomes zero."""
    return ratio(vectors, np.linalg.norm(vectors, axis=1, keepdims=True))


def basis(a: Float64[np.ndarray, "heads dim"], b: Float64[np.ndarray, "heads dim"]) -> np.ndarray:
    """An orthonormal basis (heads, dim, dim) of each head's space; its first columns are a and b.

    By QR, which keeps the first directions up to sign and fills in the rest; for a zero vector it takes any.
    """
    start = np.stack([a, b], axis=2)
    full = np.linalg.qr(start, mode="complete")[0]
    agree = np.einsum("hdc,hdc->hc", full[:, :, :2], start)
    full[:, :, :2] *= np.where(agree < 0, -1.0, 1.0)[:, None]
    return full
