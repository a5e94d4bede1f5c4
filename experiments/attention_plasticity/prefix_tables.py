"""Plasticity over prefixes as tables: by bucket, by fifth of the context, by distances; and the map of distances."""

from __future__ import annotations

import numpy as np
import polars as pl
from jaxtyping import Float64
from matplotlib.figure import Figure

from ..common.figures import canvas, grid
from .prefix import FIFTHS, Prefix


def of_prefixes(
    layer: int, heads: tuple[int, ...], found: Prefix, fifths: Float64[np.ndarray, "heads fifths"]
) -> dict[str, pl.DataFrame]:
    """The tables bucket_pairs, profile, fifths and distances of one layer; distances are in powers of two."""
    pairs = [
        pl.DataFrame(
            {
                "query_bucket": np.full(len(apart), bucket, dtype=np.int32),
                "key_bucket": later.astype(np.int32),
                "query_position": np.full(len(apart), position),
                "keys_apart": _power(apart),
                "query_away": _power(away),
                **{str(head): value for head, value in zip(heads, values, strict=True)},
            }
        )
        for bucket, position, values, later, apart, away in zip(
            found.buckets.tolist(),
            found.positions.tolist(),
            found.values,
            found.key_buckets,
            found.apart,
            found.away,
            strict=True,
        )
    ]
    every = pl.concat(pairs)
    profile = pl.DataFrame(
        {
            "layer": np.full(found.profile.size, layer, dtype=np.int16),
            "head": np.repeat(np.array(heads, dtype=np.int16), len(found.buckets)),
            "query_bucket": np.tile(found.buckets, len(heads)).astype(np.int32),
            "plasticity": found.profile.ravel(),
            "query_position": np.tile(found.positions, len(heads)),
            "empirical": found.empirical.ravel(),
        }
    )
    by_fifth = pl.DataFrame(
        {
            "layer": np.full(fifths.size, layer, dtype=np.int16),
            "head": np.repeat(np.array(heads, dtype=np.int16), FIFTHS),
            "fifth": np.tile(np.arange(1, FIFTHS + 1, dtype=np.int8), len(heads)),
            "plasticity": fifths.ravel(),
        }
    ).with_columns(pl.col("plasticity").fill_nan(None))
    return {
        "bucket_pairs": _mean(every, layer, heads, "query_bucket", "key_bucket", "query_position"),
        "profile": profile,
        "fifths": by_fifth,
        "distances": _mean(every, layer, heads, "keys_apart", "query_away"),
    }


def _power(distances: np.ndarray) -> np.ndarray:
    """The largest power of two that is not more; 0 for less than 1."""
    powers = 2.0 ** np.floor(np.log2(np.maximum(distances, 1)))
    return np.where(distances < 1, 0, powers).astype(np.int64)


def _mean(every: pl.DataFrame, layer: int, heads: tuple[int, ...], *by: str) -> pl.DataFrame:
    """The mean over pairs, per head and whatever they have in common."""
    names = [str(head) for head in heads]
    cells = every.group_by(*by).agg(pl.col(names).mean(), pl.len().alias("key_pairs")).sort(*by)
    long = cells.unpivot(names, index=[*by, "key_pairs"], variable_name="head", value_name="plasticity")
    return long.select(
        pl.lit(layer, dtype=pl.Int16).alias("layer"), pl.col("head").cast(pl.Int16), *by, "plasticity", "key_pairs"
    )


def distances_figure(distances: pl.DataFrame) -> Figure:
    """The published map: how far two keys are apart, and their middle from the query."""
    middle = distances.group_by("query_away", "keys_apart").agg(pl.col("plasticity").median())
    matrix, away, apart = grid(middle.rename({"query_away": "layer"}), "plasticity", "keys_apart")
    figure, axes = canvas("median plasticity of heads by distances")
    image = axes.imshow(matrix, origin="lower", aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(apart)), [f"{one}" for one in apart], rotation=60)
    axes.set_yticks(range(len(away)), [f"{one}" for one in away])
    axes.set(xlabel="tokens between the two keys, from", ylabel="tokens from their middle to the query, from")
    figure.colorbar(image, ax=axes)
    return figure
