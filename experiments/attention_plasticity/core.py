"""Attention plasticity: how far a query's content can still change which of two keys wins.

For keys k1 and k2 that a query q looks back at, p = P(q.k1 > q.k2) over the queries of a bucket of positions. With q
Gaussian, q.(k1 - k2) is normal with mean m and variance v, so that p = Phi(m / sqrt v), and

    plasticity = 4 p (1 - p)      1: a coin toss that content decides; 0: the same key wins whatever the query is.

Queries are modelled as a straight drift with position plus Gaussian residuals, of a covariance of its own in each
bucket. The residuals are measured from the drift line, so that what the line misses counts as variance.

This is what code had on the way (github.com/viktor-shcherb/attention-plasticity, of which three variants were
published); what plasticity is by its definition is in prefix.py. Named options tell the variants apart: `covariance`
(the full matrix, or only its diagonal in a basis whose first axis is the drift), `pairs` (both keys in one bucket, or
within a distance of each other), and what the average runs over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int
from scipy.special import ndtr

from ..common.moments import Moments, moments_of
from ..common.rows import LayerVectors
from .pairs import Pairs

COVARIANCES = ("full", "diagonal")


@dataclass(frozen=True)
class Queries:
    """Where the queries of each bucket are, by the model: mean and covariance."""

    buckets: tuple[int, ...]
    position: Float64[np.ndarray, " buckets"]
    mean: Float64[np.ndarray, "heads buckets dim"]
    covariance: Float64[np.ndarray, "heads buckets dim dim"]


def model_queries(
    queries: LayerVectors, covariance: str = "full", min_rows: int = 8, whole: Moments | None = None
) -> Queries:
    """Fits the drift to all rows, and a covariance to each bucket with at least `min_rows`.

    `whole`: the moments of these queries, where they are known already.
    """
    whole = whole or moments_of(queries)
    slope = whole.slope_t()
    line = whole.mean[:, None] + slope[:, None] * (queries.positions - whole.mean_t)[:, None]
    residual = queries.vectors - line
    buckets, counts = np.unique(queries.buckets, return_counts=True)
    kept = [int(bucket) for bucket in buckets[counts >= min_rows]]
    positions, spreads = [], []
    for bucket in kept:
        inside = queries.buckets == bucket
        share = queries.weights[inside] / queries.weights[inside].sum()
        positions.append(share @ queries.positions[inside])
        spread = residual[:, inside].swapaxes(1, 2) @ (residual[:, inside] * share[:, None])
        spreads.append(spread if covariance == "full" else _diagonal(spread, slope))
    heads, dim = whole.mean.shape
    position = np.array(positions, dtype=np.float64)
    return Queries(
        tuple(kept),
        position,
        whole.mean[:, None] + slope[:, None] * (position - whole.mean_t)[:, None],
        np.stack(spreads, axis=1) if spreads else np.empty((heads, 0, dim, dim)),
    )


def preference(
    mean: Float64[np.ndarray, "heads dim"],
    covariance: Float64[np.ndarray, "heads dim dim"],
    differences: Float64[np.ndarray, "heads pairs dim"],
) -> Float64[np.ndarray, "heads pairs"]:
    """p = P(q.(k1 - k2) > 0) for Gaussian q; without variance 1, 0 or 1/2 by the sign of the mean."""
    m = np.einsum("hpd,hd->hp", differences, mean)
    v = ((differences @ covariance) * differences).sum(2)
    certain = np.where(m == 0, 0.0, np.copysign(np.inf, m))
    return np.asarray(ndtr(np.divide(m, np.sqrt(np.maximum(v, 0)), out=certain, where=v > 0)))


def plasticity(p: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    return 4 * p * (1 - p)


@dataclass(frozen=True)
class BucketPairs:
    """Mean plasticity of each (query bucket, earlier key bucket), over `counts` key pairs."""

    query_buckets: Int[np.ndarray, " cells"]
    key_buckets: Int[np.ndarray, " cells"]
    values: Float64[np.ndarray, "heads cells"]
    counts: Int[np.ndarray, " cells"]
    query_positions: Float64[np.ndarray, " cells"]

    def of(self, cells: Bool[np.ndarray, " cells"]) -> BucketPairs:
        """Some of the cells."""
        columns = (self.values[:, cells], self.counts[cells], self.query_positions[cells])
        return BucketPairs(self.query_buckets[cells], self.key_buckets[cells], *columns)

    def mean(self, average: str) -> Float64[np.ndarray, " heads"]:
        """ "bucket_pairs": every cell counts the same; "key_pairs": every key pair does."""
        weights = np.ones(len(self.counts)) if average == "bucket_pairs" else self.counts.astype(np.float64)
        return self.values @ (weights / weights.sum())


def measure(model: Queries, keys: LayerVectors, pairs: Pairs) -> BucketPairs:
    """All pairs whose later key lies in an earlier bucket than the query's."""
    vectors = keys.vectors.astype(np.float64)
    differences = vectors[:, pairs.first] - vectors[:, pairs.second]
    cells, values = [], []
    for place, bucket in enumerate(model.buckets):
        earlier = np.flatnonzero(pairs.buckets < bucket)
        if not len(earlier):
            continue
        found = plasticity(preference(model.mean[:, place], model.covariance[:, place], differences[:, earlier]))
        key_buckets, cell, counts = np.unique(pairs.buckets[earlier], return_inverse=True, return_counts=True)
        one_hot = np.zeros((len(earlier), len(key_buckets)))
        one_hot[np.arange(len(earlier)), cell] = 1 / counts[cell]
        values.append(found @ one_hot)
        cells += [(bucket, int(k), int(n), model.position[place]) for k, n in zip(key_buckets, counts, strict=True)]
    heads = len(vectors)
    columns = list(zip(*cells, strict=True)) or [(), (), (), ()]
    return BucketPairs(
        np.array(columns[0], dtype=np.int64),
        np.array(columns[1], dtype=np.int64),
        np.concatenate(values, axis=1) if values else np.empty((heads, 0)),
        np.array(columns[2], dtype=np.int64),
        np.array(columns[3], dtype=np.float64),
    )


def _diagonal(covariance: Float64[np.ndarray, "heads dim dim"], drift: Float64[np.ndarray, "heads dim"]) -> np.ndarray:
    """The covariance without what lies off its diagonal, in a basis whose first axis is the drift."""
    turn = reflection(drift)
    variances = np.diagonal(turn @ covariance @ turn, axis1=1, axis2=2)
    return np.asarray(turn @ (variances[:, :, None] * turn))


def reflection(directions: Float64[np.ndarray, "heads dim"]) -> Float64[np.ndarray, "heads dim dim"]:
    """Householder's reflection, symmetric and orthogonal, that takes each direction to +-the first axis."""
    norms = np.linalg.norm(directions, axis=1)
    normal = directions.copy()
    # Away from the first axis rather than towards it, so that nothing cancels.
    normal[:, 0] += np.where(directions[:, 0] < 0, -norms, norms)
    normal[norms == 0] = np.eye(directions.shape[1])[0]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return np.eye(directions.shape[1]) - 2 * normal[:, :, None] * normal[:, None, :]
