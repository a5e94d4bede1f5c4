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
PUBLISHED = 10
"""Components that the published sums run over."""


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
    return _signed(queries, keys, axes, ratio(values, values.sum(1, keepdims=True)))


def leading(queries: Moments, keys: Moments, start: Float64[np.ndarray, "heads dim some"]) -> Components:
    """The leading components alone, from a guess of them: subspace iteration, then Rayleigh and Ritz.

    Of `some` axes the first come out as `components` has them; the last are as good as the guess was.
    """
    covariance = pool(queries, keys).covariance
    span = np.linalg.qr(covariance @ (covariance @ start))[0]
    values, turn = np.linalg.eigh(span.swapaxes(1, 2) @ covariance @ span)
    values, axes = np.maximum(values[:, ::-1], 0), span @ turn[:, :, ::-1]
    return _signed(queries, keys, axes, ratio(values, np.trace(covariance, axis1=1, axis2=2)[:, None]))


def _signed(queries: Moments, keys: Moments, axes: np.ndarray, explained: np.ndarray) -> Components:
    r_q, r_k = (side.along(axes).correlation_t() for side in (queries, keys))
    sign = np.where(r_q < 0, -1.0, 1.0)
    return Components(axes * sign[:, None], explained, r_q * sign, r_k * sign)


def taxonomy(r_q: Float64[np.ndarray, " n"], r_k: Float64[np.ndarray, " n"], other: float = HIGH) -> list[str]:
    """What moves with position along a component, by |r|.

    position-dominated: both from 0.7 on. q-positional, k-positional: that side from 0.7 on, the other below `other`.
    content-focused: both below 0.3. mixed: the rest. It describes variance, not what the head is for.

    Two such rules were published (github.com/viktor-shcherb/msc_thesis). That of chapter 4 is the default, `other` =
    HIGH; it has no name for k-positional heads, and counts them as mixed. That of the notes, by which the shares of
    heads and the figures were made, is `other` = LOW.
    """
    q, k = np.abs(r_q), np.abs(r_k)
    cases = [
        (q >= HIGH) & (k >= HIGH),
        (q >= HIGH) & (k < other),
        (k >= HIGH) & (q < other),
        (q < LOW) & (k < LOW),
    ]
    return [str(name) for name in np.select(cases, TAXONOMY[:-1], TAXONOMY[-1])]


def taxonomies(r_q: Float64[np.ndarray, " n"], r_k: Float64[np.ndarray, " n"]) -> dict[str, list[str]]:
    """Of chapter 4, and of the notes."""
    return {"taxonomy": taxonomy(r_q, r_k), "taxonomy_notes": taxonomy(r_q, r_k, LOW)}


def linear_share(moments: Moments) -> Float64[np.ndarray, " heads"]:
    """The share of total variance that a straight line in position explains: |Cov(x,t)|^2 / (Var t tr Var x).

    Of queries and keys pooled, their distance from each other is part of the variance; of one kind alone it is not.
    """
    return ratio((moments.covariance_t**2).sum(1), moments.variance_t * moments.total_variance)


def linear_share_of_components(
    parts: Components,
) -> tuple[Float64[np.ndarray, " heads"], Float64[np.ndarray, " heads"]]:
    """Of queries and of keys: explained variance times r squared, summed over the first PUBLISHED components.

    So the published shares, of about a quarter and a seventh, were had. Explained variance is that of queries and keys
    pooled, r that of one kind, so that it is no share of either's variance.
    """
    explained = parts.explained[:, :PUBLISHED]
    return (explained * parts.r_q[:, :PUBLISHED] ** 2).sum(1), (explained * parts.r_k[:, :PUBLISHED] ** 2).sum(1)
