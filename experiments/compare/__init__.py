"""Runs beside one another: head by head, by depth, over a training, against your own scores; see README.md here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
from matplotlib.figure import Figure

from sniffer.config.resolve import conf_folder
from sniffer.errors import ConfigError, RunError
from sniffer.process.environment import commit, now
from sniffer.storage.remote import folder_at
from sniffer.storage.untrusted import CONFIG_BYTES, read_json
from sniffer.terminal.printing import say

from ..common import results
from ..common.entry import Analysis, destination, make, overrides, progress
from ..common.results import PROVENANCE, Result
from . import figures
from .measured import Measured, chosen, measure, steps
from .members import Course, Member, course, members, paths
from .scores import correlations, read_scores
from .summary import findings
from .tables import Compared, Key, depth_table, differences_table, histogram_table, names_table, runs_table

NO_ANALYSES = ("compare", "published", "report", "sampling_error", "stability")
"""Without a table of heads to compare."""

MAIN = {
    "position_geometry": ["bias_strength", "r_k"],
    "attention_plasticity": ["plasticity", "drop"],
    "attention": ["entropy", "first", "previous", "induction"],
    "key_rank": ["rank"],
    "quantisation": ["channel_2bit", "token_2bit"],
    "output_error": ["kivi_2bit", "heavy_25"],
    "rope_frequencies": ["concentration"],
    "query_key_gap": ["gap"],
}
"""What is compared unless told otherwise."""


@dataclass(frozen=True)
class Compare:
    """Compares runs by what analyses say of their heads.

    Attributes:
        analysis: one or several.
        statistic: one or several columns of their tables of heads; None for MAIN.
        settings: of the analysis; of several, by name.
        baseline: the label of the run that others are compared with; None for the first.
        average: over a run's heads: "mean" or "median".
        groups: of documents, from whose spread intervals follow (`experiments.common.documents`); 0 for none.
        seed: deals documents into groups.
        level: of intervals.
        depths: stretches of depth.
        bins: of a histogram.
        scores: a CSV file with a column `run` and columns of numbers.
    """

    analysis: Any = "position_geometry"
    statistic: Any = None
    settings: dict[str, Any] | None = None
    baseline: str | None = None
    average: str = "mean"
    groups: int = 6
    seed: int = 0
    level: float = 0.95
    depths: int = 20
    bins: int = 40
    scores: str | None = None

    def __post_init__(self) -> None:
        known = sorted({file.stem for file in (conf_folder() / "analysis").glob("*.yaml")} - {*NO_ANALYSES})
        if not self.names or not {*self.names} <= {*known}:
            raise ConfigError(f"compare.analysis={self.analysis} must name some of {', '.join(known)}")
        if self.average not in ("mean", "median"):
            raise ConfigError(f"compare.average={self.average} must be mean or median")
        if self.groups < 0 or not 0 < self.level < 1 or min(self.depths, self.bins) < 1:
            raise ConfigError("compare wants groups 0 or more, level within 0 and 1, depths and bins 1 or more")

    @property
    def names(self) -> list[str]:
        return _listed(self.analysis)

    @property
    def analyses(self) -> dict[str, Analysis]:
        """Raises ConfigError where the settings are none of theirs."""
        own = self.settings or {}
        if len(self.names) == 1 and self.names[0] not in own:
            own = {self.names[0]: own}
        if wrong := [name for name in own if name not in self.names]:
            raise ConfigError(
                f"compare.settings has {', '.join(wrong)}: with several analyses, give settings by analysis"
            )
        return {name: make(name, dict(own.get(name) or {})) for name in self.names}

    def measure(self, found: Sequence[Member]) -> Result:
        """Tables: runs (per run and statistic), differences (per head), depths, histograms, names; and correlations.

        Raises:
            ConfigError: an unknown baseline or statistic, or scores that cannot be used.
            RunError: fewer than two of the runs can be measured.
        """
        labels = [member.label for member in found]
        if self.baseline is not None and self.baseline not in labels:
            raise ConfigError(f"compare.baseline={self.baseline} is none of the runs: {', '.join(labels)}")
        given = None if self.scores is None else read_scores(self.scores, found)
        wanted = None if self.statistic is None else _listed(self.statistic)
        measured, left_out = self._measured(found, wanted)
        if len(measured) < 2:
            told = "; ".join(f"{label}: {reason}" for label, reason in left_out.items())
            raise RunError(
                f"{len(measured)} of {len(found)} runs could be measured, and a comparison needs two: {told}"
            )
        there = tuple(member for member in found if member.label in measured)
        if self.baseline is not None and self.baseline not in measured:
            raise RunError(f"the baseline {self.baseline} could not be measured: {left_out[self.baseline]}")
        compared = Compared(there, measured, self.baseline or there[0].label, self.average, self.level)
        keys = chosen([one.heads for one in measured.values()], wanted, MAIN)
        tables = {
            "runs": runs_table(compared, keys),
            "differences": differences_table(compared, keys),
            "depths": depth_table(compared, keys, self.depths),
            "histograms": histogram_table(compared, keys, self.bins),
            "names": names_table(compared),
        }
        said: list[str] = []
        if given is not None:
            scores, said = given
            scores = scores.filter(pl.col("run").is_in(list(measured)))
            tables["scores"] = scores
            tables["correlations"] = correlations(tables["runs"], scores, keys, self.level)
        trained = course(there)
        sentences = findings(compared, keys, tables, left_out, trained, self.groups)
        return Result(tables, [*sentences, *said], dict(self._figures(compared, keys, tables, trained)))

    def _measured(
        self, found: Sequence[Member], wanted: list[str] | None
    ) -> tuple[dict[str, Measured], dict[str, str]]:
        """By label, what could be measured, and why the rest could not."""
        analyses, measured, left_out = self.analyses, dict[str, Measured](), dict[str, str]()
        total = sum(steps(one.run, analyses) for one in found)
        bar = iter(progress(range(total + 1), f"comparing {len(found)} runs", total + 1))
        next(bar)
        for member in found:
            try:
                measured[member.label] = measure(
                    member.run, analyses, wanted, self.groups, self.seed, lambda: next(bar, None)
                )
            except RunError as error:
                left_out[member.label] = str(error)
        for _ in bar:  # what was left out has no more steps
            pass
        return measured, left_out

    def _figures(
        self, found: Compared, keys: Sequence[Key], tables: Mapping[str, pl.DataFrame], trained: Course | None
    ) -> Iterator[tuple[str, Figure]]:
        labels = [member.label for member in found.members]
        for key in keys:
            named = {
                kind: figures.file_of(kind, key) for kind in ("runs", "differences", "depth", "histogram", "training")
            }
            yield named["runs"], figures.runs_figure(tables["runs"], key, self.average, self.level)
            if (drawn := figures.differences_figure(tables["differences"], key, found.baseline)) is not None:
                yield named["differences"], drawn
            yield named["depth"], figures.depth_figure(tables["depths"], key, self.average, labels)
            yield named["histogram"], figures.histogram_figure(tables["histograms"], key, labels)
            if trained is not None:
                yield (
                    named["training"],
                    figures.trajectory_figure(tables["runs"], key, trained, self.average, self.level),
                )
        for analysis, statistic in (
            tables["names"].select("analysis", "statistic").unique(maintain_order=True).iter_rows()
        ):
            some = tables["names"].filter(analysis=analysis, statistic=statistic)
            yield f"names_{analysis}_{statistic}", figures.names_figure(some, statistic, labels)
        for row in tables.get("correlations", pl.DataFrame()).iter_rows(named=True):
            key = row["analysis"], row["statistic"], row["kind"]
            name = figures.file_of(f"scores_{_word(row['score'])}", key)
            yield name, figures.scores_figure(tables["runs"], tables["scores"], key, row["score"], row)


def compare(name: str, words: Sequence[str]) -> None:
    """The command line; results lie in experiments/compare of the folder that was given, or of the first run of a list.

    Raises:
        ConfigError: no runs, or settings that cannot be used.
        RunError: the runs cannot be compared.
    """
    settings = overrides(words)
    runs, out = settings.pop("runs", None), settings.pop("out", None)
    if not isinstance(runs, str):
        said = "compare takes runs=, not run=" if "run" in settings else "no runs are given"
        raise ConfigError(
            f"{said}: python -m sniffer.experiments {name} runs=outputs/SWEEP, or runs=[outputs/A,outputs/B]"
        )
    comparison = make(name, settings)
    assert isinstance(comparison, Compare)
    given = paths(runs)
    found = members(given)
    place = folder_at(given[0]) if len(given) == 1 else found[0].run.folder
    folder = destination(out, place, name)
    result = comparison.measure(found)
    earlier = _files(folder)
    drawn = [f"{name}.{ending}" for name in result.figures for ending in ("png", "svg")]
    files = sorted([*drawn, *(f"{name}.parquet" for name in result.tables)])
    results.write(result, folder, {**_provenance(comparison, found), "files": files})
    # Of other statistics than before, what is not there any more would seem to belong to this comparison.
    for name in earlier - {*files}:
        (folder / name).unlink(missing_ok=True)
    for sentence in result.findings:
        say(sentence)
    say(folder, style="bold")


def _provenance(comparison: Compare, found: Sequence[Member]) -> dict[str, Any]:
    first = found[0].run
    return {
        "analysis": type(comparison).__name__,
        "settings": asdict(comparison),
        "run": first.folder.name,
        "run_digest": first.manifest.digest,
        "runs": {one.label: {"folder": one.run.folder.name, "digest": one.run.manifest.digest} for one in found},
        "created": now(),
        "commit": commit(),
    }


def _files(folder: Path) -> set[str]:
    """Tables and figures that an earlier comparison left here, as its provenance says; names of such files only."""
    try:
        told = read_json(folder / PROVENANCE, CONFIG_BYTES)["files"]
        names = {str(name) for name in told}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if Path(name).name == name and Path(name).suffix in (".png", ".svg", ".parquet")}


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def _word(text: str) -> str:
    """A name of a file."""
    return "".join(letter if letter.isalnum() else "_" for letter in text)
