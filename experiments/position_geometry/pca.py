"""Principal components of a head's pooled queries and keys, and what position has to do with each.

A component is not made to follow position: it follows variance. How strongly queries and keys move along it with
position says whether position is among the largest things that the head's space holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from ..common.moments import Moments, pool, ratio

TAXONOMY = ("position-dominated", "q-positional", "k-positional", "content-focused", "mixed")
LOW, HIGH = 0.3, 0.7


@dataclass(frozen=True)
class Components:
    """Principal components, largest first. `r_q`, `r_k`: Pearson's r with position, signed so that r_q >= 0."""

    axes: Float64[np.ndarray, "heads dim components"]
    explained: Float64[np.ndarray, "heads components"]
    r_q: Float64[np.ndarray, "heads components"]
    r_k: Float64[np.ndarray, "heads components"]


def components(queries: Moments, keys: Moments) -> Components:
    """Eigenvectors of the pooled covariance, about the pooled mean."""
    values, axes = np.linalg.eigh(pool(queries, keys).covariance)
    values, axes = np.maximum(values[:, ::-1], 0), axes[:, :, ::-1]
    r_q, r_k = (side.along(axes).correlation_t() for side in (queries, keys))
    sign = np.where(r_q < 0, -1.0, 1.0)
    return Components(axes * sign[:, None], ratio(values, values.sum(1, keepdims=True)), r_q * sign, r_k * sign)


def taxonomy(r_q: Float64[np.ndarray, " n"], r_k: Float64[np.ndarray, " n"]) -> list[str]:
    """What moves with position along a component, by |r|.

    position-dominated: both from 0.7 on. q-positional, k-positional: that side from 0.7 on, the other below.
    content-focused: both below 0.3. mixed: the rest. It describes variance, not what the head is for.
    """
    q, k = np.abs(r_q), np.abs(r_k)
    cases = [
        (q >= HIGH) & (k >= HIGH),
        q >= HIGH,
        k >= HIGH,
        (q < LOW) & (k < LOW),
    ]
    return [str(name) for name in np.select(cases, TAXONOMY[:-1], TAXONOMY[-1])]


def linear_share(pooled: Moments) -> Float64[np.ndarray, " heads"]:
    """The share of total variance that a straight line in position explains: |Cov(x,t)|^2 / (Var t tr Var x)."""
    return ratio((pooled.covariance_t**2).sum(1), pooled.variance_t * pooled.total_variance)
