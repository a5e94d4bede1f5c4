"""How far what is said of heads depends on the text that they read; see README.md here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from sniffer import open_run
from sniffer.config.resolve import conf_folder
from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.storage.remote import folder_at
from sniffer.terminal.printing import say

from ..common import results
from ..common.documents import Portion, Source, deal
from ..common.entry import Analysis, Quick, destination, make, overrides, progress
from ..common.figures import BLUE, canvas, head_map
from ..common.results import Result, middle
from ..compare.measured import PLACE, numbers
from ..compare.members import members, paths
from .core import agreement, concordance, rank_correlation, spread

NO_ANALYSES = ("compare", "published", "query_groups", "report", "sampling_error", "stability", "virtual_distance")
LEFT_OUT = {"resamples": 0, "points": 1}
"""Settings of what this has no use for."""
FEWEST = 3
"""Heads below which nothing can be said of them."""

Texts = Mapping[str, Run]


@dataclass(frozen=True)
class Stability:
    """Sets sections of a run, or runs, against one another by what analyses say of their heads.

    Attributes:
        analysis: one or several.
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: which to set against one another, of a run; None for all.
        halves: whether to measure two random halves of the documents too.
        resamples: draws of layers that intervals rest on; 0 for none.
        level: the share of draws that an interval holds.
        seed: of draws and halves.
    """

    analysis: Any = ("position_geometry", "attention_plasticity")
    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    halves: bool = True
    resamples: int = 200
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        known = sorted({file.stem for file in (conf_folder() / "analysis").glob("*.yaml")} - {*NO_ANALYSES})
        if not self.names or not {*self.names} <= {*known}:
            raise ConfigError(f"stability.analysis={self.analysis} must name some of {', '.join(known)}")
        if self.resamples < 0 or not 0 < self.level < 1:
            raise ConfigError("stability wants resamples 0 or more, and level within 0 and 1")

    @property
    def names(self) -> list[str]:
        given = self.analysis
        return [str(one) for one in given] if isinstance(given, list | tuple) else [str(given)]

    def texts(self, run: Run) -> Texts:
        """The sections of a run, each as if it were one.

        Raises:
            RunError: it has fewer than two.
        """
        wanted = list(self.sections or run.sections)
        if len(wanted) < 2:
            raise RunError(
                f"{run.folder} has {', '.join(wanted) or 'no sections'}: texts to set against one another are two "
                "sections of a run or more, or runs=[A,B,...]"
            )
        return {name: run.only([name]) for name in wanted}

    def measure(self, texts: Texts) -> Result:
        """Tables: statistics (per analysis and column), pairs (per two texts and statistic), spread (per head).

        Raises:
            RunError: fewer than two of the texts can be measured.
        """
        analyses = {name: self._analysis(name) for name in self.names}
        found, said = {}, []
        for label, run in progress(list(texts.items()), "stability"):
            try:
                found[label] = _numbers(analyses, run)
            except RunError as error:
                said.append(f"Left out is {label}: {error}")
        if len(found) < 2:
            raise RunError(f"{len(found)} of {len(texts)} texts can be measured, and this takes two. {' '.join(said)}")
        halves = self._halves(analyses, next(iter(texts.values()))) if self.halves else None
        wide, apart = _side_by_side(found), None if halves is None else _side_by_side(halves)
        statistics, pairs, spreads = [], [], []
        for key, table in wide.items():
            values = table.select(list(found)).to_numpy()
            if len(values) < FEWEST or np.ptp(values) == 0:
                continue
            statistics.append((*key, *self._statistic(table, values), *self._of_halves(key, apart)))
            spreads.append(table.select("layer", "head").with_columns(spread=pl.Series(spread(values))))
            for one, other in combinations(found, 2):
                x, y = table[one].to_numpy(), table[other].to_numpy()
                numbers_of = (rank_correlation(x, y), concordance(x, y), float((y - x).mean()))
                pairs.append((*key, one, other, *numbers_of))
        if not statistics:
            raise RunError("no statistic varies over heads in these texts")
        tables = {"statistics": _statistics_table(statistics), "pairs": _pairs_table(pairs), "spread": _heads(spreads)}
        return Result(tables, [*said, *self._findings(tables, list(found))], partial(_figures, tables))

    def _analysis(self, name: str) -> Analysis:
        settings = {"layers": self.layers, "weights": self.weights, **LEFT_OUT}
        known = {*asdict(make(name, {}))}  # type: ignore[call-overload]
        return make(name, {key: value for key, value in settings.items() if key in known})

    def _halves(self, analyses: Mapping[str, Analysis], run: Run) -> dict[str, pl.DataFrame] | None:
        """Two halves of the documents of the first text; None where there is only one, or too few rows of either."""
        dealt = deal(run, 2, self.seed)
        if dealt is None:
            return None
        source = Source(run)
        try:
            return {str(place): _numbers(analyses, Portion(source, ids)) for place, ids in enumerate(dealt.groups)}
        except RunError:
            return None

    def _statistic(self, table: pl.DataFrame, values: np.ndarray) -> tuple[int, float, float, float, float]:
        """Heads; absolute agreement, from and to; consistency."""
        absolute, consistent = agreement(values)
        low = high = np.nan
        layers, place = np.unique(table["layer"].to_numpy(), return_inverse=True)
        if len(layers) > 1 and self.resamples:
            rng = np.random.default_rng(self.seed)
            times = rng.multinomial(len(layers), np.full(len(layers), 1 / len(layers)), size=self.resamples)
            again = agreement(values, times[:, place].astype(np.float64))[0]
            low, high = np.nanquantile(again, [(1 - self.level) / 2, (1 + self.level) / 2])
        return len(values), float(absolute[0]), float(low), float(high), float(consistent[0])

    @staticmethod
    def _of_halves(key: tuple[str, ...], apart: Mapping[tuple[str, ...], pl.DataFrame] | None) -> tuple[float]:
        if apart is None or key not in apart or len(apart[key]) < FEWEST:
            return (np.nan,)
        return (float(agreement(apart[key].select("0", "1").to_numpy())[0][0]),)

    def _findings(self, tables: Mapping[str, pl.DataFrame], labels: Sequence[str]) -> list[str]:
        table = tables["statistics"].drop_nulls("agreement")
        most, least = (_named(table.row(place, named=True)) for place in (0, -1))
        said = [
            f"Over {len(labels)} texts ({', '.join(labels)}) the agreement of {len(table)} statistics of heads is "
            f"{middle(table['agreement']):.2f} in the median (1: a head's number is the same in every text).",
            f"Most stable is {most}, least {least}.",
        ]
        if table["halves"].is_not_null().any():
            both = table.drop_nulls("halves")
            said.append(
                f"Between two random halves of the documents of {labels[0]} it is {middle(both['halves']):.2f} in the "
                f"median; {int((both['agreement'] < both['halves']).sum())} of {len(both)} statistics agree less "
                "between texts than between halves of one."
            )
        else:
            said.append(
                "There are no halves to hold this against: they take two documents and enough rows of each half."
            )
        if table["low"].is_not_null().any():
            said.append(
                f"In brackets: where {self.level:.0%} of {self.resamples} draws of layers lie, with replacement."
            )
        return said


def _numbers(analyses: Mapping[str, Analysis], run: Run) -> pl.DataFrame:
    """Every number of every head."""
    tables = []
    for name, analysis in analyses.items():
        heads = analysis.quick(run) if isinstance(analysis, Quick) else analysis.measure(run).tables["heads"]
        tables.append(numbers(name, heads))
    return pl.concat(tables)


def _side_by_side(found: Mapping[str, pl.DataFrame]) -> dict[tuple[str, ...], pl.DataFrame]:
    """Per analysis, statistic and kind: layer, head, and a column per text, of heads that have a number in all."""
    whole: pl.DataFrame | None = None
    for label, table in found.items():
        mine = table.rename({"value": label})
        whole = mine if whole is None else whole.join(mine, on=PLACE, how="inner")
    assert whole is not None
    parted = whole.drop_nulls().partition_by(*PLACE[:3], as_dict=True, maintain_order=True)
    return {tuple(map(str, key)): table for key, table in parted.items()}


def _statistics_table(rows: Sequence[tuple[Any, ...]]) -> pl.DataFrame:
    schema = {
        **dict.fromkeys(PLACE[:3], pl.String),
        "heads": pl.Int64,
        **dict.fromkeys(("agreement", "low", "high", "consistency", "halves"), pl.Float64),
    }
    table = pl.DataFrame(rows, schema=schema, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))
    return table.sort("agreement", descending=True, nulls_last=True)


def _pairs_table(rows: Sequence[tuple[Any, ...]]) -> pl.DataFrame:
    schema = {
        **dict.fromkeys((*PLACE[:3], "text", "other"), pl.String),
        **dict.fromkeys(("rank_correlation", "concordance", "difference"), pl.Float64),
    }
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))


def _heads(spreads: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The root mean square over statistics."""
    mean = (pl.col("spread") ** 2).mean().sqrt()
    return pl.concat(spreads).group_by("layer", "head").agg(mean).sort("layer", "head").cast({"layer": pl.Int16})


def _named(row: Mapping[str, Any]) -> str:
    of_kind = f" of {row['kind']}" if row["kind"] else ""
    value = f"{row['agreement']:.2f}"
    if row["low"] is not None:
        value += f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['analysis']}'s {row['statistic']}{of_kind} ({value})"


def _figures(tables: Mapping[str, pl.DataFrame]) -> dict[str, Figure]:
    some = tables["statistics"].drop_nulls("agreement").reverse()
    figure, axes = canvas("agreement between texts; crosses: between halves of one", 7.0, 1.4 + 0.17 * len(some))
    low, high = (some[name].fill_null(some["agreement"]).to_numpy() for name in ("low", "high"))
    axes.hlines(range(len(some)), low, high, color=BLUE, linewidth=1)
    axes.scatter(some["agreement"], range(len(some)), color=BLUE, s=14, zorder=2)
    axes.scatter(some["halves"].fill_null(np.nan), range(len(some)), color="black", marker="x", s=16, linewidths=0.8)
    labels = [f"{one} ({of})" for of, one in some.select("analysis", "statistic").iter_rows()]
    axes.set_yticks(range(len(some)), labels)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.3)
    spreads = head_map(tables["spread"], "spread", "spread of a head over texts, in standard deviations of heads")
    return {"statistics": figure, "spread": spreads}


def steady(name: str, words: Sequence[str]) -> None:
    """The command line; results lie in experiments/stability of the folder that was given, or of the first run.

    Raises:
        ConfigError: no runs, runs of several models, or settings that cannot be used.
        RunError: fewer than two texts can be measured.
    """
    settings = overrides(words)
    one, several, out = (settings.pop(key, None) for key in ("run", "runs", "out"))
    if (one is None) == (several is None):
        raise ConfigError(f"give run=outputs/RUN, whose sections are compared, or runs=[A,B,...]: {name} --help")
    study = make(name, settings)
    assert isinstance(study, Stability)
    given = paths(str(several)) if one is None else [str(one)]
    texts = _runs(study, given) if one is None else study.texts(_one(given[0]))
    first = next(iter(texts.values()))
    folder = destination(out, folder_at(given[0]) if len(given) == 1 else first.folder, name)
    result = study.measure(texts)
    results.write(result, folder, results.of_runs(study, texts))
    for sentence in result.findings:
        say(sentence)
    say(folder, style="bold")


def _one(path: str) -> Run:
    found = open_run(path)
    if not isinstance(found, Run):
        raise ConfigError(f"{path} has several runs: write runs={path}")
    return found


def _runs(study: Stability, given: Sequence[str]) -> Texts:
    if study.sections is not None:
        raise ConfigError("stability.sections are of one run=RUN: leave them out with runs=")
    found = members(given)
    models = {f"{one.checkpoint}@{one.revision}" if one.revision else one.checkpoint for one in found}
    if len(models) > 1:
        raise ConfigError(
            f"stability is of one model over texts, and these are {', '.join(sorted(models))}: use compare"
        )
    return {one.label: one.run for one in found}
