"""Maps of what a run has beside vectors: means of its statistics of attention, and its moments over all positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from sniffer.reader.run import Run

ATTENTION = {
    "entropy": "entropy of a query's weights over all its keys, in nats, mean over queries",
    "lse": "logarithm of the sum of a query's exponentiated logits, mean over queries",
    "max_logit": "largest logit of a query, mean over queries",
    "first": "weight of position 0, mean over queries",
    "self": "weight of the query's own position, mean over queries",
    "sink": "weight of learned sinks, mean over queries",
    "out_norm": "Euclidean norm of the head's output, mean over queries",
}
MOMENTS = {
    "length": "mean Euclidean length of a vector, over all positions",
    "length_of_mean": "Euclidean length of the mean vector, over all positions",
    "spread": "root of the total variance, over all positions",
    "largest": "largest absolute value at any position",
}


def attention(run: Run) -> pl.DataFrame | None:
    """layer, head, and a mean of each statistic; None where the run has none.

    Rows count with the inverse of their inclusion probability, so that a mean is over all positions.
    """
    names = [name for name in ATTENTION if name in run.statistics]
    if not names:
        return None
    rows = run.scan(kind="attention", inclusion_probability=True).filter(pl.col("inclusion_probability") > 0)
    weight = 1 / pl.col("inclusion_probability")
    there = [name for name in names if name in rows.collect_schema().names()]
    means = [((pl.col(name) * weight).sum() / weight.sum()).alias(name) for name in there]
    return rows.group_by("layer", "head").agg(*means, pl.len().alias("rows")).sort("layer", "head").collect()


def moments(run: Run) -> pl.DataFrame | None:
    """layer, head, kind, and numbers of each head's moments; None where the run has none."""
    layout = run.manifest.moments_layout
    if layout is None or not run.manifest.moment_files:
        return None
    lines: list[dict[str, Any]] = []
    for layer in run.layers:
        for kind in layout.kinds:
            for head in run.counted_heads(layer, kind):
                found = run.moments(layer=layer, head=head, kind=kind)
                line = {"length": found.norm, "length_of_mean": float(np.linalg.norm(found.mean))}
                if found.squares is not None:
                    line["spread"] = float(np.sqrt(found.squares.sum() / found.n))
                line["largest"] = float(found.absmax.max())
                lines.append({"layer": layer, "head": head, "kind": kind, **line, "rows": found.n})
    return pl.DataFrame(lines, infer_schema_length=None) if lines else None
