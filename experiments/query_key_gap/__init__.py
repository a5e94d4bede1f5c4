"""Why searching keys by queries is harder than searching keys by keys; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float64
from matplotlib.figure import Figure

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run

from ..common.entry import progress
from ..common.exact import exact_moments, has_exact, told
from ..common.figures import by_layer, head_map, lines
from ..common.moments import Moments, moments_of
from ..common.results import Result, head_columns, middle
from ..common.rows import LayerVectors, chosen_layers, key_places, load, of_sections
from .core import distance, recalls


@dataclass(frozen=True)
class QueryKeyGap:
    """Mahalanobis distance of queries from keys, and recall of an index over keys.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`; for the distances.
        sections: only rows of these; None for all.
        shrinkage: of the keys' covariance.
        recall: whether to measure recall, which needs faiss.
        top: the nearest keys that a search should find.
        cells: clusters of the index; None takes the square root of the number of keys.
        probes: shares of the clusters to look through.
        searches: searches per head, of queries and of keys.
        seed: draws the keys left out, the searches, and the clusters' beginnings.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    shrinkage: float = 0.01
    recall: bool = True
    top: int = 10
    cells: int | None = None
    probes: list[float] = field(default_factory=lambda: [0.03, 0.06, 0.12, 0.25, 0.5])
    searches: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.shrinkage < 1:
            raise ConfigError(f"query_key_gap.shrinkage={self.shrinkage} must lie between 0 and 1")
        if not self.probes or not all(0 < share <= 1 for share in self.probes):
            raise ConfigError(f"query_key_gap.probes={self.probes} must be shares above 0, 1 at most")
        if min(self.top, self.searches, 1 if self.cells is None else self.cells) < 1:
            raise ConfigError("query_key_gap wants top, searches and cells of 1 or more")

    def measure(self, run: Run) -> Result:
        """Tables: heads, and with recall, recall (per head and share of clusters looked through)."""
        run = of_sections(run, self.sections)
        layers = chosen_layers(run, self.layers, "q", "k")
        found = [self._layer(run, layer) for layer in progress(layers, "query-key gap")]
        heads = pl.concat([table for table, _ in found])
        tables = {"heads": heads}
        if self.recall:
            tables["recall"] = pl.concat([table for _, table in found])
        said = _findings(tables, self)
        if layers and all(has_exact(run, kind, self.weights) for kind in ("q", "k")):
            said.append(told(run, "Distances are"))
        return Result(tables, said, partial(_figures, tables))

    def _layer(self, run: Run, layer: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        queries, keys = load(run, layer, "q", self.weights), load(run, layer, "k", self.weights)
        places = key_places(run, queries, keys)
        rng = np.random.default_rng([self.seed, layer])
        left_out = np.zeros(len(keys), dtype=bool)
        left_out[rng.choice(len(keys), size=len(keys) // 4, replace=False)] = True
        inside, outside = keys.take(~left_out), keys.take(left_out)
        exact = self._exact(run, layer, queries, keys)
        # Of all positions there is no need to leave keys out: a law of so many keys fits them as it would others.
        of_queries, law, others = exact or (moments_of(queries), moments_of(inside), moments_of(outside))
        distance_q = distance(of_queries, law.of_heads(places), self.shrinkage)
        distance_k = distance(others, law, self.shrinkage)[places]
        columns = {"distance_q": distance_q, "distance_k": distance_k, "gap": distance_q / distance_k}
        recall = pl.DataFrame()
        if self.recall:
            found = self._recalls(queries, inside, outside, places, rng)
            recall = _recall_table(layer, queries.heads, self.probes, found)
            # The share of clusters nearest to an eighth stands for all in the table of heads.
            shown = int(np.argmin(np.abs(np.array(self.probes) - 0.125)))
            columns |= {"recall_q": found[0, :, shown], "recall_k": found[1, :, shown]}
        return head_columns(layer, queries.heads, **columns), recall

    def _exact(
        self, run: Run, layer: int, queries: LayerVectors, keys: LayerVectors
    ) -> tuple[Moments, Moments, Moments] | None:
        """Of queries, of keys, and of keys again."""
        of_queries, of_keys = (
            exact_moments(run, layer, rows.kind, self.weights, rows.heads) for rows in (queries, keys)
        )
        return None if of_queries is None or of_keys is None else (of_queries, of_keys, of_keys)

    def _recalls(
        self,
        queries: LayerVectors,
        inside: LayerVectors,
        outside: LayerVectors,
        places: list[int],
        rng: np.random.Generator,
    ) -> Float64[np.ndarray, "sides heads probes"]:
        """Recall by queries and by left-out keys, for each query head."""
        if len(inside) <= self.top:
            raise RunError(
                f"layer {queries.layer} has {len(inside)} keys to search, and top={self.top} wants more: "
                "capture more with sampler.base_rate, or set a smaller top"
            )
        cells = min(self.cells or max(2, round(len(inside) ** 0.5)), len(inside))
        probes = [max(1, round(share * cells)) for share in self.probes]
        by_query, by_key = (
            rows.vectors[:, rng.choice(len(rows), size=min(self.searches, len(rows)), replace=False)]
            for rows in (queries, outside)
        )
        found = np.empty((2, len(places), len(probes)))
        for place in sorted(set(places)):
            heads = [head for head, served in enumerate(places) if served == place]
            searches = [by_key[place], *(by_query[head] for head in heads)]
            recall = recalls(inside.vectors[place], searches, self.top, cells, probes, self.seed)
            found[1, heads] = recall[0]
            found[0, heads] = recall[1:]
        return found


def _recall_table(
    layer: int, heads: tuple[int, ...], probes: list[float], found: Float64[np.ndarray, "sides heads probes"]
) -> pl.DataFrame:
    frames = [
        head_columns(layer, heads, recall_q=found[0, :, place], recall_k=found[1, :, place]).with_columns(
            pl.lit(share).alias("share_of_cells")
        )
        for place, share in enumerate(probes)
    ]
    return pl.concat(frames)


def _findings(tables: dict[str, pl.DataFrame], settings: QueryKeyGap) -> list[str]:
    heads = tables["heads"]
    far = heads.sort("gap").row(-1, named=True)
    said = [
        f"Queries lie {middle(heads['gap']):.1f} times as far from the keys' distribution as keys left out of it do "
        f"(median over {len(heads)} heads, Mahalanobis); most in layer {far['layer']}, head {far['head']} "
        f"({far['gap']:.1f} times).",
    ]
    if "recall" in tables:
        curve = tables["recall"].group_by("share_of_cells").agg(pl.col("recall_q", "recall_k").mean())
        shares = [
            f"{row['share_of_cells']:.0%} of its clusters finds {row['recall_q']:.0%} for queries and "
            f"{row['recall_k']:.0%} for keys"
            for row in curve.sort("share_of_cells").iter_rows(named=True)
        ]
        said.append(
            f"Of the {settings.top} keys that an index over keys should find, looking through {'; '.join(shares)} "
            "(means over heads)."
        )
    return said


def _figures(tables: dict[str, pl.DataFrame]) -> dict[str, Figure]:
    heads = tables["heads"]
    figures = {
        "gap": head_map(heads, "gap", "distance of queries over that of keys"),
        "distances": by_layer(
            heads,
            {"queries": "distance_q", "keys left out": "distance_k"},
            "Mahalanobis distance from the keys",
            "per root dimension",
        ),
    }
    if "recall" in tables:
        curve = tables["recall"].group_by("share_of_cells").agg(pl.col("recall_q", "recall_k").mean())
        curve = curve.sort("share_of_cells")
        share = curve["share_of_cells"].to_list()
        figures["recall"] = lines(
            {"queries": (share, curve["recall_q"].to_list()), "keys": (share, curve["recall_k"].to_list())},
            "recall of an index over keys, mean over heads",
            "share of clusters looked through",
            "recall",
        )
    return figures
