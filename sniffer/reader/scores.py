"""Logits of captured queries and keys, computed again from what the manifest tells of a layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from sniffer.errors import RunError
from sniffer.types import ScoreFacts

if TYPE_CHECKING:
    from sniffer.reader.run import Run


def scores(run: Run, layer: int, q_head: int, example_id: int) -> pl.DataFrame:
    """As `Run.scores`."""
    facts = facts_of(run, layer)
    geometry = run.manifest.layer(layer)
    if geometry.scaling is None:
        raise RunError(f"layer {layer} of {run.folder} has no scaling in its manifest: capture again")
    queries = run.vectors(layer=layer, head=q_head, kind="q")
    keys = run.vectors(layer=layer, head=geometry.key_head(q_head), kind="k")
    mine, theirs = (np.flatnonzero(rows.example_ids == example_id) for rows in (queries, keys))
    if not len(mine) or not len(theirs):
        raise RunError(
            f"{run.folder} has {len(mine)} queries and {len(theirs)} keys of example {example_id} in layer {layer}, "
            f"head {q_head}: run.examples() lists the documents; a denser sampler keeps some of each"
        )
    mine = mine[np.argsort(queries.positions[mine])]
    theirs = theirs[np.argsort(keys.positions[theirs])]
    at, to = queries.positions[mine], keys.positions[theirs]
    products = queries.vectors[mine].astype(np.float64) @ keys.vectors[theirs].astype(np.float64).T
    logits = facts.logits(products, geometry.scaling, to[None, :], q_head)
    seen = (to[None, :] <= at[:, None]) & (to[None, :] >= geometry.first_key(at)[:, None])
    logits = np.where(seen, logits, -math.inf)
    table = pl.DataFrame(
        {
            "query_position": np.repeat(at, len(to)),
            "key_position": np.tile(to, len(at)),
            "seen": seen.reshape(-1),
            "logit": logits.reshape(-1),
            "key_inclusion_probability": np.tile(keys.inclusion_probability[theirs], len(at)),
        }
    )
    if "lse" not in run.statistics:
        return table
    rows = run.attention(layer=layer, q_head=q_head).filter(pl.col("example_id") == example_id)
    lse = dict(rows.select("position", "lse").iter_rows())
    weights = np.exp(logits - np.array([lse[int(position)] for position in at])[:, None])
    return table.with_columns(probability=pl.Series(weights.reshape(-1)))


def facts_of(run: Run, layer: int) -> ScoreFacts:
    """What the manifest tells of a layer's logits.

    Raises:
        RunError: the layer was not captured, or its logits cannot be had from q and k, and why.
    """
    run.heads(layer, "q")
    told = run.manifest.scores.get(layer)
    if told is None:
        raise RunError(
            f"{run.folder} was captured by a release that did not tell what logits are made of: capture it anew"
        )
    facts = ScoreFacts.from_json(told)
    if facts.missing:
        raise RunError(f"logits of layer {layer} cannot be had from its q and k: {facts.missing}")
    return facts
