"""Whether query heads that share keys prefer the same ones, and are alike in their statistics; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run

from ..common.entry import progress
from ..common.figures import BLUE, ORANGE, canvas, head_map
from ..common.left import NOT_STATISTICS, query_head_tables
from ..common.resampling import Draws, draw_documents, percentiles, sums_by
from ..common.results import Result
from ..common.rows import chosen_layers, key_places, load, of_sections
from .core import Groups, agreement, intraclass, key_covariance, same_group, shuffled

WAYS = ("agreement", "beyond_position")
CHANCE = 0.05
"""The share of shuffles that may agree as much as heads that count as alike."""


@dataclass(frozen=True)
class QueryGroups:
    """Agreement of query heads within groups, and between groups of one layer.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only rows of these; None for all.
        resamples: draws of documents, and of layers, that intervals rest on; 0 for none.
        level: the share of draws that an interval holds.
        shuffles: of the heads within their layers, against which agreement of statistics is held.
        seed: draws all of these.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    resamples: int = 200
    level: float = 0.95
    shuffles: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 0 or self.shuffles < 1 or not 0 < self.level < 1:
            raise ConfigError("query_groups wants resamples 0 or more, shuffles 1 or more, level within 0 and 1")

    def measure(self, run: Run) -> Result:
        """Tables: pairs (of query heads of a layer), heads, statistics (of what other analyses left of this run)."""
        whole, run = run, of_sections(run, self.sections)
        layers = chosen_layers(run, self.layers, "q", "k")
        if all(len(_places(run, layer)) == len(set(_places(run, layer).tolist())) for layer in layers):
            raise RunError(
                f"in {run.folder} no two captured query heads share a key head: there are no groups to compare"
            )
        draws = draw_documents(run, self.resamples, self.seed)
        found = [self._layer(run, layer, draws) for layer in progress(layers, "query groups")]
        pairs = pl.concat([one[0] for one in found])
        again = None if draws is None else np.concatenate([one[1] for one in found], axis=1)
        statistics = self._statistics(whole)
        summary = self._summary(pairs, again)
        tables = {"heads": _heads(pairs), "pairs": pairs, "statistics": statistics, "summary": summary}
        documents = None if draws is None else draws.documents
        return Result(tables, self._findings(summary, statistics, documents), partial(_figures, tables))

    def _layer(self, run: Run, layer: int, draws: Draws | None) -> tuple[pl.DataFrame, np.ndarray]:
        """The pairs of a layer; and in each draw of documents, of queries alone (draws, pairs, ways)."""
        queries, keys = load(run, layer, "q", self.weights), load(run, layer, "k", self.weights)
        places = np.array(key_places(run, queries, keys))
        r = [agreement(queries.vectors, places, key_covariance(keys, beyond_position=way)) for way in (False, True)]
        share = queries.weights / queries.weights.sum()
        first, second = np.triu_indices(len(places), 1)
        heads, of = np.array(queries.heads), np.array(keys.heads)[places]
        pairs = pl.DataFrame(
            {
                "layer": np.full(len(first), layer, dtype=np.int16),
                "head": heads[first].astype(np.int16),
                "other": heads[second].astype(np.int16),
                "key_head": of[first].astype(np.int16),
                "other_key_head": of[second].astype(np.int16),
                "same_group": same_group(places),
                **{name: one @ share for name, one in zip(WAYS, r, strict=True)},
            }
        )
        if draws is None:
            return pairs, np.empty((0, len(first), len(WAYS)))
        weighted = np.stack(
            [np.stack([one, np.ones_like(one)], axis=2) * queries.weights[:, None] for one in r], axis=2
        )
        sums = np.tensordot(draws.counts, sums_by(draws.units, draws.of(queries), weighted), axes=1)
        with np.errstate(invalid="ignore"):
            return pairs, sums[..., 0] / sums[..., 1]

    def _summary(self, pairs: pl.DataFrame, again: np.ndarray | None) -> pl.DataFrame:
        """Means over pairs of heads, within groups and between them, and by how much these differ."""
        rows = []
        inside = pairs["same_group"].to_numpy()
        for place, way in enumerate(WAYS):
            values = pairs[way].to_numpy()[None]
            drawn = values if again is None else np.concatenate([values, again[:, :, place]])
            parts = [
                drawn[:, mask].mean(1) if mask.any() else np.full(len(drawn), np.nan) for mask in (inside, ~inside)
            ]
            for name, numbers in zip(("within", "between", "difference"), (*parts, parts[0] - parts[1]), strict=True):
                low, high = (np.nan, np.nan) if again is None else percentiles(numbers[1:], self.level)
                rows.append((way, name, float(numbers[0]), float(low), float(high)))
        schema = {"what": pl.String, "heads": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64}
        return pl.DataFrame(rows, schema=schema, orient="row").with_columns(
            pl.col("value", "low", "high").fill_nan(None)
        )

    def _statistics(self, run: Run) -> pl.DataFrame:
        """The intraclass correlation of each statistic that other analyses left of these rows."""
        rows = []
        for analysis, table in [] if self.sections else query_head_tables(run):
            if analysis == "query_groups":
                continue
            for name in table.columns:
                if name in NOT_STATISTICS or not table.schema[name].is_numeric():
                    continue
                numbers = table.select("layer", "head", value=pl.col(name).cast(pl.Float64).fill_nan(None)).drop_nulls()
                if found := self._of_statistic(run, numbers):
                    rows.append((analysis, name, *found))
        numbers_of = dict.fromkeys(("intraclass", "low", "high", "p"), pl.Float64)
        schema = {"analysis": pl.String, "statistic": pl.String, **numbers_of, "groups": pl.Int64}
        return pl.DataFrame(rows, schema=schema, orient="row").sort("intraclass", descending=True)

    def _of_statistic(
        self, run: Run, table: pl.DataFrame
    ) -> tuple[float, float | None, float | None, float, int] | None:
        """Its intraclass correlation, from, to, how often a shuffle has as much, groups; None where it says nothing."""
        where = table.select("layer", "head").rows()
        group = [(layer, run.manifest.layer(layer).key_head(head)) for layer, head in where]
        if not group or len(set(group)) == len(group):
            return None
        layers = {layer: place for place, layer in enumerate(dict.fromkeys(layer for layer, _ in where))}
        numbers = {one: place for place, one in enumerate(dict.fromkeys(group))}
        of = Groups(np.array([layers[layer] for layer, _ in where]), np.array([numbers[one] for one in group]))
        values, rng = table["value"].to_numpy(), np.random.default_rng(self.seed)
        value = float(intraclass(values[None], of)[0])
        if not np.isfinite(value) or _of_keys_alone(values, of):
            return None
        chance = intraclass(shuffled(values, of, self.shuffles, rng), of)
        p = (1 + int((chance >= value).sum())) / (1 + self.shuffles)
        low = high = None
        if len(layers) > 1 and self.resamples:
            times = rng.multinomial(len(layers), np.full(len(layers), 1 / len(layers)), size=self.resamples)
            again = intraclass(np.broadcast_to(values, (self.resamples, len(values))), of, times.astype(np.float64))
            again = again[np.isfinite(again)]
            low, high = map(float, percentiles(again, self.level))
        return value, low, high, p, len(numbers)

    def _findings(self, summary: pl.DataFrame, statistics: pl.DataFrame, documents: int | None) -> list[str]:
        value = {(what, of): _told(*rest) for what, of, *rest in summary.iter_rows()}
        said = [
            f"Two query heads that share keys agree on them at r = {value['agreement', 'within']} (mean of pairs), "
            f"beyond position at {value['beyond_position', 'within']}.",
        ]
        if summary["value"].is_not_null().all():
            said.append(
                f"Two of one layer that do not share any agree on tokens at {value['agreement', 'between']}, beyond "
                f"position at {value['beyond_position', 'between']}; the difference that sharing makes is "
                f"{value['agreement', 'difference']}, and {value['beyond_position', 'difference']}."
            )
        if len(statistics):
            most, least = (
                f"{one['analysis']}'s {one['statistic']} ({_told(one['intraclass'], one['low'], one['high'])})"
                for one in (statistics.row(place, named=True) for place in (0, -1))
            )
            sure = int((statistics["p"] < CHANCE).sum())
            said.append(
                f"Of {len(statistics)} statistics of queries that other analyses left, {sure} are more alike within "
                f"groups than in {1 - CHANCE:.0%} of shuffles of a layer's heads; most so {most}, least {least} "
                "(intraclass correlation)."
            )
        elif self.sections:
            said.append("Statistics that other analyses left are of all rows: leave sections out to compare them.")
        else:
            said.append("Other analyses left no statistics of these rows: run position_geometry first to compare them.")
        if documents:
            said.append(
                f"In brackets: where {self.level:.0%} of {self.resamples} draws lie, of the queries of {documents} "
                "documents with the keys as they are, and for statistics of layers."
            )
        return said


def _of_keys_alone(values: np.ndarray, of: Groups) -> bool:
    """Whether heads of a group all have one value, as where it is that of their keys: nothing can be learnt of it."""
    return all(np.ptp(values[of.group == group]) == 0 for group in np.unique(of.group))


def _told(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _places(run: Run, layer: int) -> np.ndarray:
    """The key head of each captured query head."""
    return np.array([run.manifest.layer(layer).key_head(head) for head in run.heads(layer, "q")])


def _heads(pairs: pl.DataFrame) -> pl.DataFrame:
    """Per query head: how far it agrees with others of its group, and with those of other groups of its layer."""
    turned = pairs.rename(
        {"head": "other", "other": "head", "key_head": "other_key_head", "other_key_head": "key_head"}
    )
    both = pl.concat([pairs, turned.select(pairs.columns)])
    means = {
        f"{name}_{way}": pl.col(way).filter(pl.col("same_group") if name == "within" else ~pl.col("same_group")).mean()
        for way in WAYS
        for name in ("within", "between")
    }
    return both.group_by("layer", "head", "key_head").agg(**means).sort("layer", "head")


def _figures(tables: dict[str, pl.DataFrame]) -> dict[str, Figure]:
    pairs, statistics = tables["pairs"], tables["statistics"]
    figures = {
        "within": head_map(
            tables["heads"], "within_agreement", "agreement with the heads of the same keys", signed=True
        ),
        "by_layer": _by_layer(pairs),
    }
    if len(statistics):
        figures["statistics"] = _alike(statistics)
    return figures


def _by_layer(pairs: pl.DataFrame) -> Figure:
    figure, axes = canvas("agreement of two query heads of a layer; dashed: beyond position")
    for same, colour, label in ((True, BLUE, "that share keys"), (False, ORANGE, "with keys of their own")):
        some = pairs.filter(same_group=same).group_by("layer").agg(pl.col(*WAYS).mean()).sort("layer")
        if len(some):
            axes.plot(some["layer"], some["agreement"], color=colour, marker="o", markersize=3, label=label)
            axes.plot(some["layer"], some["beyond_position"], color=colour, linestyle="--")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="layer", ylabel="r")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _alike(statistics: pl.DataFrame) -> Figure:
    some = statistics.reverse()
    figure, axes = canvas("intraclass correlation of query heads that share keys", 7.0, 1.2 + 0.18 * len(some))
    low, high = (some[name].fill_null(some["intraclass"]).to_numpy() for name in ("low", "high"))
    axes.hlines(range(len(some)), low, high, color=BLUE, linewidth=1)
    axes.scatter(some["intraclass"], range(len(some)), color=BLUE, s=14, zorder=2)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(some)), [f"{one} ({of})" for of, one in some.select("analysis", "statistic").iter_rows()])
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.3)
    return figure
