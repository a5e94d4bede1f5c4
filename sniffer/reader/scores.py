"""Logits of captured queries and keys, computed again from what the manifest tells of a layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from jaxtyping import Float, Float64, Int

from sniffer.errors import RunError
from sniffer.types import LayerGeometry, ScoreFacts

if TYPE_CHECKING:
    from sniffer.reader.run import Run


def scores(run: Run, layer: int, q_head: int, example_id: int) -> pl.DataFrame:
    """As `Run.scores`."""
    facts, geometry = facts_of(run, layer), run.manifest.layer(layer)
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
    logits = logits_of(geometry, facts, q_head, queries.vectors[mine], keys.vectors[theirs], at, to)
    table = pl.DataFrame(
        {
            "query_position": np.repeat(at, len(to)),
            "key_position": np.tile(to, len(at)),
            "seen": np.isfinite(logits).reshape(-1),
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


def logits_of(
    layer: LayerGeometry,
    facts: ScoreFacts,
    q_head: int,
    queries: Float[np.ndarray, "queries dim"],
    keys: Float[np.ndarray, "keys dim"],
    at: Int[np.ndarray, " queries"],
    to: Int[np.ndarray, " keys"],
) -> Float64[np.ndarray, "queries keys"]:
    """Logits of one text's queries at positions `at` over its keys at positions `to`, as the manifest tells of a layer.

    Minus infinity where the layer keeps a pair apart. Learned sinks are beside these, `facts.sinks[q_head]`.

    Raises:
        RunError: the manifest has no scaling.
    """
    if layer.scaling is None:
        raise RunError(f"layer {layer.layer} has no scaling in its manifest: capture again")
    products = queries.astype(np.float64) @ keys.astype(np.float64, copy=False).T
    logits = facts.logits(products, layer.scaling, to[None, :], q_head)
    seen = (to[None, :] <= at[:, None]) & (to[None, :] >= layer.first_key(at)[:, None])
    return np.where(seen, logits, -math.inf)


def facts_of(run: Run, layer: int) -> ScoreFacts:
    """What the manifest tells of a layer's logits.

    Raises:
        RunError: the layer was not captured, or its logits cannot be had from q and k, and why.
    """
    run.heads(layer, "q")
    told = run.manifest.scores.get(layer)
    if told is None and run.manifest.imported:
        raise RunError(
            f"{run.folder} was imported from files that do not tell what logits are made of: capture it anew"
        )
    if told is None:
        raise RunError(
            f"{run.folder} was captured by a release that did not tell what logits are made of: capture it anew"
        )
    facts = ScoreFacts.from_json(told)
    if facts.missing:
        raise RunError(f"logits of layer {layer} cannot be had from its q and k: {facts.missing}")
    return facts
