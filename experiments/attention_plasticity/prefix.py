"""Attention plasticity as it is defined: two keys of all that comes before the query.

    for each bucket of queries, at its midpoint tau
        keys      of one document, any two that lie in earlier buckets, and within the layer's window of tau
        queries   Gaussian: along the drift a straight line in position, whose residuals have one variance; across it
                  a mean and variances of the bucket's own
        p         = Phi(mean / sqrt variance) of q.(k1 - k2), and the plasticity 4 p (1 - p), averaged over pairs
    a head's value is the mean over buckets by their number of positions, first and last those of the first and last
    fifth of the context

Source: the chapter "Attention Plasticity" of github.com/viktor-shcherb/msc_thesis: pairwise preference, pairwise
and attention plasticity, decomposition by a Householder reflection, Gaussian closed form, bucketing and aggregation.

Beside it stands the same with no model of the queries: p is the share of the bucket's real queries that prefer the
first key, and 4 p (1 - p) is made free of its bias, a factor of n / (n - 1) for n queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int

from sniffer.types import first_key

from ..common.moments import moments_of
from ..common.reflection import householder
from ..common.rows import LayerVectors
from .core import Queries, plasticity, preference

FIFTHS = 5


@dataclass(frozen=True)
class Prefix:
    """What was found, for each bucket of queries that has keys before it.

    `spans` are the positions of each bucket, from and up to. Per pair: the bucket of the later key, and how far the two
    are apart, and their middle from the query.
    """

    buckets: Int[np.ndarray, " buckets"]
    positions: Float64[np.ndarray, " buckets"]
    spans: Int[np.ndarray, "buckets 2"]
    values: tuple[Float64[np.ndarray, "heads pairs"], ...]
    key_buckets: tuple[Int[np.ndarray, " pairs"], ...]
    apart: tuple[Int[np.ndarray, " pairs"], ...]
    away: tuple[Float64[np.ndarray, " pairs"], ...]
    empirical: Float64[np.ndarray, "heads buckets"]

    @property
    def profile(self) -> Float64[np.ndarray, "heads buckets"]:
        return np.stack([values.mean(1) for values in self.values], axis=1)

    def overall(self, profile: Float64[np.ndarray, "heads buckets"]) -> Float64[np.ndarray, " heads"]:
        """The mean over buckets, each counting as many times as it has positions."""
        return self._within(profile, 0, int(self.spans.max()))

    def fifths(self, length: int) -> Float64[np.ndarray, "heads fifths"]:
        """The mean over the positions of each fifth of a context of this length; NaN where none was measured."""
        cuts = [length * part // FIFTHS for part in range(FIFTHS + 1)]
        profile = self.profile
        return np.stack([self._within(profile, *cuts[part : part + 2]) for part in range(FIFTHS)], axis=1)

    def _within(self, profile: Float64[np.ndarray, "heads buckets"], first: int, end: int) -> np.ndarray:
        inside = np.clip(np.minimum(self.spans[:, 1], end) - np.maximum(self.spans[:, 0], first), 0, None)
        if not inside.sum():
            return np.full(len(profile), np.nan)
        return np.asarray(profile @ (inside / inside.sum()))


def model_buckets(queries: LayerVectors, covariance: str, min_rows: int) -> Queries:
    """Line and mean and variances of each bucket with at least `min_rows` queries, at the middle of its positions."""
    whole = moments_of(queries)
    slope = whole.slope_t()
    turn = householder(slope)
    turned = queries.vectors.astype(np.float64) @ turn  # symmetric: of rows as of columns
    start, rise = (np.einsum("hd,hde->he", one, turn)[:, 0] for one in (whole.mean, slope))
    line = start[:, None] + rise[:, None] * (queries.positions - whole.mean_t)
    along = turned[:, :, 0] - line
    residual_variance = (along**2) @ (queries.weights / queries.weights.sum())
    buckets, counts = np.unique(queries.buckets, return_counts=True)
    kept = [int(bucket) for bucket in buckets[counts >= min_rows]]
    positions, means, spreads = [], [], []
    for bucket in kept:
        inside = queries.buckets == bucket
        share = queries.weights[inside] / queries.weights[inside].sum()
        tau = (int(queries.positions[inside].min()) + int(queries.positions[inside].max())) / 2
        mean = np.einsum("hnd,n->hd", turned[:, inside], share)
        residual = turned[:, inside] - mean[:, None]
        residual[:, :, 0] = along[:, inside]
        spread = residual.swapaxes(1, 2) @ (residual * share[:, None])
        if covariance == "diagonal":
            spread = spread * np.eye(spread.shape[1])
        spread[:, 0, 0] = residual_variance
        mean[:, 0] = start + rise * (tau - whole.mean_t)
        positions.append(tau)
        means.append(np.einsum("hd,hde->he", mean, turn))
        spreads.append(turn @ spread @ turn)
    heads, dim = whole.mean.shape
    return Queries(
        tuple(kept),
        np.array(positions, dtype=np.float64),
        np.stack(means, axis=1) if means else np.empty((heads, 0, dim)),
        np.stack(spreads, axis=1) if spreads else np.empty((heads, 0, dim, dim)),
    )


def draw_prefix_pairs(
    keys: LayerVectors, eligible: Bool[np.ndarray, " n"], count: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Row numbers of two different keys of one document, each by its weight; no pairs where no document has two."""
    rows = np.flatnonzero(eligible)
    rows = rows[np.argsort(keys.example_ids[rows], kind="stable")]
    _, document, sizes = np.unique(keys.example_ids[rows], return_inverse=True, return_counts=True)
    able = rows[sizes[document] > 1]
    if not len(able):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    _, document, sizes = np.unique(keys.example_ids[able], return_inverse=True, return_counts=True)
    weights = keys.weights[able].astype(np.float64)
    ends = np.cumsum(weights)
    begins = ends - weights
    first = rng.choice(len(able), size=count, p=weights / ends[-1])
    last_of = np.cumsum(sizes) - 1
    begin, end = begins[last_of - sizes + 1][document[first]], ends[last_of][document[first]]
    # A place on the line of the document's weights, of which the first key's own piece is cut out.
    place = begin + rng.random(count) * (end - begin - weights[first])
    place += np.where(place >= begins[first], weights[first], 0.0)
    second = np.minimum(np.searchsorted(ends, place, side="right"), last_of[document[first]])
    return able[first], able[second]


def measure_prefixes(
    queries: LayerVectors,
    keys: LayerVectors,
    model: Queries,
    count: int,
    rng: np.random.Generator,
    window: int | None,
    *,
    chunked: bool = False,
) -> Prefix:
    """Draws `count` pairs for each bucket of queries; keys have one head per query head.

    `window` and `chunked` say what a query sees, as in `sniffer.types.LayerGeometry`.
    """
    vectors = keys.vectors.astype(np.float64)
    found: list[tuple[int, float, tuple[int, int], np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for place, bucket in enumerate(model.buckets):
        tau = model.position[place]
        seen_from = first_key(np.array([int(tau)]), window, chunked=chunked)[0]
        eligible = (keys.buckets < bucket) & (keys.positions >= seen_from)
        first, second = draw_prefix_pairs(keys, eligible, count, rng)
        if not len(first):
            continue
        differences = vectors[:, first] - vectors[:, second]
        values = plasticity(preference(model.mean[:, place], model.covariance[:, place], differences))
        at = keys.positions[first].astype(np.int64), keys.positions[second].astype(np.int64)
        span = _span(queries, keys, bucket)
        later = np.maximum(keys.buckets[first], keys.buckets[second]).astype(np.int64)
        real = _empirical(queries, queries.buckets == bucket, differences)
        found.append((bucket, tau, span, values, later, np.abs(at[0] - at[1]), tau - (at[0] + at[1]) / 2, real))
    columns = list(zip(*found, strict=True)) or [()] * 8
    return Prefix(
        np.array(columns[0], dtype=np.int64),
        np.array(columns[1], dtype=np.float64),
        np.array(columns[2], dtype=np.int64).reshape(-1, 2),
        tuple(columns[3]),
        tuple(columns[4]),
        tuple(columns[5]),
        tuple(columns[6]),
        np.stack(columns[7], axis=1) if found else np.empty((len(vectors), 0)),
    )


def _span(queries: LayerVectors, keys: LayerVectors, bucket: int) -> tuple[int, int]:
    """The positions that were captured of a bucket, from and up to."""
    there = np.concatenate([rows.positions[rows.buckets == bucket] for rows in (queries, keys)])
    return int(there.min()), int(there.max()) + 1


def _empirical(
    queries: LayerVectors, inside: Bool[np.ndarray, " n"], differences: Float64[np.ndarray, "heads pairs dim"]
) -> Float64[np.ndarray, " heads"]:
    """The mean plasticity of pairs by counting the bucket's queries."""
    share = queries.weights[inside] / queries.weights[inside].sum()
    scores = queries.vectors[:, inside].astype(np.float64) @ differences.swapaxes(1, 2)
    p = np.einsum("hnp,n->hp", (scores > 0) + 0.5 * (scores == 0), share)
    # Of weighted draws, as many count as equal ones would (Kish, 1965).
    effective = 1 / (share**2).sum()
    return np.asarray((plasticity(p) * effective / max(effective - 1, 1e-9)).mean(1))
