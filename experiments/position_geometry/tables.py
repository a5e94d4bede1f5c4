"""The tables of position_geometry beside that of heads."""

from __future__ import annotations

import numpy as np
import polars as pl

from sniffer.types import Rope

from ..common.rows import LayerVectors
from .heads import Numbers
from .line import REJECTED, Line, by_pair
from .pca import Components
from .plane import Plane


def component_table(layer: int, heads: tuple[int, ...], parts: Components) -> pl.DataFrame:
    each = parts.explained.shape[1]
    return _per_head(layer, heads, each).with_columns(
        component=pl.Series(np.tile(np.arange(1, each + 1, dtype=np.int16), len(heads))),
        explained=pl.Series(parts.explained.ravel()),
        r_q=pl.Series(parts.r_q.ravel()),
        r_k=pl.Series(parts.r_k.ravel()),
    )


def dimension_table(rows: LayerVectors, found: Line, rope: Rope | None) -> pl.DataFrame:
    """Per dimension: how much of it the line explains, its weight, and its rotary pair (null: it does not turn)."""
    dim = found.r2.shape[1]
    pair = np.full(dim, -1, dtype=np.int16)
    if rope is not None:
        for place in rope.places(pre=False):
            pair[place] = np.arange(len(rope.inv_freq))
    return _per_head(rows.layer, rows.heads, dim).with_columns(
        kind=pl.lit(rows.kind),
        dimension=pl.Series(np.tile(np.arange(dim, dtype=np.int16), len(rows.heads))),
        r2=pl.Series(found.r2.ravel()),
        weight=pl.Series(found.weight.ravel()),
        pair=pl.Series(np.tile(pair, len(rows.heads))).replace(-1, None),
    )


def rotary_table(rows: LayerVectors, found: Line, rope: Rope | None) -> pl.DataFrame:
    """Per rotary pair, fastest first: its frequency in radians per position, and the weights of its two dimensions."""
    pairs = 0 if rope is None else len(rope.inv_freq)
    weight = by_pair(found.weight, rope.places(pre=False)) if rope is not None else np.empty((len(rows.heads), 0))
    return _per_head(rows.layer, rows.heads, pairs).with_columns(
        kind=pl.lit(rows.kind),
        pair=pl.Series(np.tile(np.arange(pairs, dtype=np.int16), len(rows.heads))),
        inv_freq=pl.Series(np.tile(np.array(rope.inv_freq if rope else (), dtype=np.float64), len(rows.heads))),
        weight=pl.Series(weight.ravel()),
    )


def line_table(rows: LayerVectors, found: Line) -> pl.DataFrame:
    """Per head and kind: the line and what it leaves, along its slope (drift_) and across it (rest_, of dimensions)."""
    shape = found.shape
    return _per_head(rows.layer, rows.heads, 1).with_columns(
        kind=pl.lit(rows.kind),
        r2=pl.Series(found.r2.mean(1)),
        drift_r2=pl.Series(found.drift_r2),
        drift_skew=pl.Series(shape.skew[:, 0]),
        drift_kurtosis=pl.Series(shape.kurtosis[:, 0]),
        drift_ks=pl.Series(shape.distance[:, 0]),
        drift_ks_p=pl.Series(shape.p[:, 0]),
        rest_abs_skew=pl.Series(np.median(np.abs(shape.skew[:, 1:]), axis=1)),
        rest_abs_kurtosis=pl.Series(np.median(np.abs(shape.kurtosis[:, 1:]), axis=1)),
        rest_ks=pl.Series(np.median(shape.distance[:, 1:], axis=1)),
        rest_ks_p=pl.Series(np.median(shape.p[:, 1:], axis=1)),
        rest_rejected=pl.Series((shape.p[:, 1:] < REJECTED).mean(1)),
    )


def interval_table(layer: int, heads: tuple[int, ...], found: Numbers, bounds: Numbers) -> pl.DataFrame:
    """Per head and statistic: its value and interval; `bounds` are (2, heads), nan where there is none."""
    frames = [
        _per_head(layer, heads, 1).with_columns(
            statistic=pl.lit(name),
            value=pl.Series(np.asarray(values, dtype=np.float64)),
            low=pl.Series(bounds[name][0]),
            high=pl.Series(bounds[name][1]),
        )
        for name, values in found.items()
    ]
    return (
        pl.concat(frames).with_columns(pl.col("value", "low", "high").fill_nan(None)).sort("head", maintain_order=True)
    )


def plane_points(
    layer: int, queries: LayerVectors, keys: LayerVectors, model: Plane, count: int, seed: int
) -> pl.DataFrame:
    """Some vectors of each head, as seen on the plane."""
    frames = []
    for rows in (queries, keys):
        rng = np.random.default_rng([seed, layer])
        some = rows.take(np.sort(rng.choice(len(rows), size=min(count, len(rows)), replace=False)))
        heads, n = some.vectors.shape[:2]
        frames.append(
            _per_head(layer, queries.heads, n).with_columns(
                kind=pl.lit(rows.kind),
                position=pl.Series(np.tile(some.positions, heads)),
                a=pl.Series(np.einsum("hnd,hd->hn", some.vectors, model.a).ravel().astype(np.float32)),
                b=pl.Series(np.einsum("hnd,hd->hn", some.vectors, model.b).ravel().astype(np.float32)),
            )
        )
    return pl.concat(frames)


def _per_head(layer: int, heads: tuple[int, ...], each: int) -> pl.DataFrame:
    """The columns layer and head, so many rows for each head."""
    return pl.DataFrame(
        {
            "layer": np.full(len(heads) * each, layer, dtype=np.int16),
            "head": np.repeat(np.array(heads, dtype=np.int16), each),
        }
    )
