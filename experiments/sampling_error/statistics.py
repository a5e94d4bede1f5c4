"""The statistics of the other analyses, small enough to be worked out hundreds of times.

Each is one number per query head, from queries and the keys they attend with; those of keys alone appear with every
query head that a key head serves. All but the first are ratios or maxima, so that even unbiased weights leave
some bias in small samples; the first is a plain Horvitz-Thompson mean and has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from ..attention_plasticity.core import measure, model_queries
from ..attention_plasticity.pairs import draw_pairs
from ..common.moments import Moments, moments_of, pool, ratio
from ..common.rows import MIN_ROWS, LayerVectors
from ..key_rank import rank_at, spectrum
from ..position_geometry.pca import linear_share
from ..position_geometry.plane import plane
from ..quantisation.core import quantised, relative_error
from ..query_key_gap.core import distance
from ..rope_frequencies.core import concentration, norms, rotary_pairs

KEY_PAIRS = 64
MIN_QUERIES = 4
SHRINKAGE = 0.01
BITS, GROUP = 2, 32

PerHead = Float64[np.ndarray, " heads"]


def statistics(
    queries: LayerVectors,
    keys: LayerVectors,
    places: list[int],
    n_positions: int,
    before: LayerVectors | None = None,
    pairs: tuple[str, int] = ("", 0),
) -> dict[str, PerHead]:
    """Every statistic of a layer; undefined where there are too few rows for it.

    Args:
        keys: one per key head; `places` says which of them each query head attends with.
        n_positions: how many positions the rows were drawn from.
        before: the queries before RoPE, where they were captured.
        pairs: how RoPE pairs their dimensions: layout and width, as `find_layout` gives them.
    """
    undefined = np.full(len(queries.heads), np.nan)
    found = {"key_energy": energy(keys, n_positions)[places]}
    enough = min(len(queries), len(keys)) >= MIN_ROWS
    sums = Sums.of(queries, keys) if enough else None
    for part in (_geometry, _plasticity, _keys, _gap):
        names, values = part(queries, keys, places, sums) if sums is not None else (NAMES[part.__name__], ())
        found |= dict(zip(names, values, strict=True)) if enough else dict.fromkeys(names, undefined)
    if before is not None:
        found["concentration"] = _concentration(before, *pairs) if enough else undefined
    return found


def energy(rows: LayerVectors, n_positions: int) -> PerHead:
    """The mean of |x|^2 over all positions: an unbiased estimate, whatever the sample (Horvitz and Thompson, 1952)."""
    squares = (rows.vectors.astype(np.float64) ** 2).sum(2)
    return squares @ rows.weights / n_positions


NAMES = {
    "_geometry": ("r_q", "r_k", "bias_strength", "linear_share", "pc1_explained"),
    "_plasticity": ("plasticity",),
    "_keys": ("key_rank", "quantisation"),
    "_gap": ("query_key_gap",),
}
Values = tuple[tuple[str, ...], tuple[PerHead, ...]]


@dataclass(frozen=True)
class Sums:
    """Moments that several statistics share, summed once: of queries, of keys, of keys left out and of the others."""

    q: Moments
    k: Moments
    inside: Moments
    outside: Moments

    @classmethod
    def of(cls, queries: LayerVectors, keys: LayerVectors) -> Sums:
        left_out = np.arange(len(keys)) % 4 == 0
        inside, outside = moments_of(keys.take(~left_out)), moments_of(keys.take(left_out))
        return cls(moments_of(queries), pool(inside, outside), inside, outside)


def _geometry(queries: LayerVectors, keys: LayerVectors, places: list[int], sums: Sums) -> Values:
    k = sums.k.of_heads(places)
    model, both = plane(sums.q, k), pool(sums.q, k)
    leading = ratio(np.linalg.eigvalsh(both.covariance)[:, -1], both.total_variance)
    return NAMES["_geometry"], (model.r_q, model.r_k, model.bias_strength, linear_share(both), leading)


def _plasticity(queries: LayerVectors, keys: LayerVectors, places: list[int], sums: Sums) -> Values:
    pairs = draw_pairs(keys, "bucket", KEY_PAIRS, np.random.default_rng(0))
    model = model_queries(queries, min_rows=MIN_QUERIES, whole=sums.q)
    cells = measure(model, keys.of_heads(places), pairs)
    value = cells.mean("bucket_pairs") if len(cells.counts) else np.full(len(places), np.nan)
    return NAMES["_plasticity"], (value,)


def _keys(queries: LayerVectors, keys: LayerVectors, places: list[int], sums: Sums) -> Values:
    ordered = keys.take(np.lexsort((keys.positions, keys.example_ids)))
    restored = quantised(ordered.vectors, BITS, "channel", GROUP)
    error = relative_error(ordered.vectors, restored, ordered.weights)
    return NAMES["_keys"], (rank_at(spectrum(sums.k), 0.9)[places].astype(np.float64), error[places])


def _gap(queries: LayerVectors, keys: LayerVectors, places: list[int], sums: Sums) -> Values:
    near = distance(sums.outside, sums.inside, SHRINKAGE)[places]
    return NAMES["_gap"], (distance(sums.q, sums.inside.of_heads(places), SHRINKAGE) / near,)


def _concentration(before: LayerVectors, layout: str, rotary: int) -> PerHead:
    z = rotary_pairs(before.vectors, layout, rotary)
    return np.asarray((concentration(z, before.weights) * norms(z, before.weights)[1]).sum(1))
