"""The published figures, drawn of your own runs; see README.md here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from matplotlib.figure import Figure

from sniffer import open_run
from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.storage.remote import folder_at
from sniffer.terminal.printing import say

from ..common import results
from ..common.entry import destination, make, overrides, progress
from ..common.results import Result
from ..compare.members import Member, course, members, paths
from .catalogue import CATALOGUE, Asked, Drawing, file_of, named
from .studied import Studied


@dataclass(frozen=True)
class Published:
    """Draws published figures.

    Attributes:
        figure: "all", the name of one, or a part of it that says which.
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only rows of these; None for all.
        scores: a CSV file with a column `run` and one of scores.
        seed: draws the heads that collages show.
    """

    figure: str = "all"
    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    scores: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        named(str(self.figure))

    def measure(self, found: Sequence[Member]) -> Result:
        """Table: figures (per published name: its file, or why there is none).

        Raises:
            ConfigError: a figure that was asked for by itself needs more runs, or scores.
            RunError: none of the runs can be measured.
        """
        wanted = named(str(self.figure))
        runs, said = self._able(found)
        ordered = course([run.member for run in runs]) if len(runs) > 1 else None
        if ordered is not None:
            by_label = {run.label: run for run in runs}
            in_order = [by_label[member.label] for member in ordered.members]
        else:
            in_order = runs
        rows: dict[str, tuple[str | None, str | None]] = {}
        drawn: dict[str, Figure] = {}
        for name, drawing in progress(list(wanted.items()), "published figures"):
            file = file_of(name)
            try:
                if file not in drawn:
                    able = in_order if drawing.over_training else runs
                    drawn[file] = self._draw(drawing, with_plasticity(able, said) if drawing.plasticity else able)
                rows[name] = file, None
            except (ConfigError, RunError) as error:
                if len(wanted) == 1:
                    raise ConfigError(f"{name}: {error}") from error
                rows[name] = None, str(error)
        if not drawn:
            raise ConfigError("; ".join(_not_drawn(rows)))
        return Result({"figures": _table(rows)}, [*said, *_findings(rows, drawn, runs)], drawn)

    def _able(self, found: Sequence[Member]) -> tuple[list[Studied], list[str]]:
        """The runs that can be measured, and a sentence on each that cannot."""
        able, said = [], []
        for member in progress(found, "runs"):
            one = Studied(member, self.layers, self.weights, self.sections)
            try:
                one.need()
                able.append(one)
            except RunError as error:
                if len(found) == 1:
                    raise
                said.append(f"Left out is {member.label}: {error}")
        if not able:
            raise RunError(f"none of the runs can be measured. {' '.join(said)}")
        return able, said

    def _draw(self, drawing: Drawing, runs: Sequence[Studied]) -> Figure:
        if len(runs) < drawing.fewest:
            raise ConfigError(
                f"it sets runs beside one another, and there is {len(runs)}: give runs=SWEEP or runs=[A,B,...]"
            )
        return drawing.draw(runs, Asked(self.scores, self.seed))


def with_plasticity(runs: Sequence[Studied], said: list[str]) -> list[Studied]:
    """The runs whose plasticity can be measured; a sentence on each other one is said, once.

    Raises:
        RunError: there is none.
    """
    able = []
    for run in runs:
        try:
            if len(run.plasticity["heads"]):
                able.append(run)
        except RunError as error:
            if len(runs) == 1:
                raise
            sentence = f"Figures of plasticity leave out {run.label}: {error}"
            if sentence not in said:
                said.append(sentence)
    if not able:
        raise RunError("plasticity cannot be measured in any of the runs")
    return able


def _table(rows: dict[str, tuple[str | None, str | None]]) -> pl.DataFrame:
    columns = {
        "published": list(rows),
        "shows": [CATALOGUE[name].shows for name in rows],
        "file": [file for file, _ in rows.values()],
        "not_drawn": [reason for _, reason in rows.values()],
    }
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))


def _findings(
    rows: dict[str, tuple[str | None, str | None]], drawn: dict[str, Figure], runs: Sequence[Studied]
) -> list[str]:
    labels = ", ".join(run.label for run in runs)
    made = sum(file is not None for file, _ in rows.values())
    said = [f"{made} of the {len(CATALOGUE)} published figures are drawn of {labels}, in {len(drawn)} files."]
    return [*said, *(f"Not drawn: {one}." for one in _not_drawn(rows))]


def _not_drawn(rows: dict[str, tuple[str | None, str | None]]) -> list[str]:
    """The names and why, those of one reason together."""
    reasons = dict.fromkeys(reason for _, reason in rows.values() if reason is not None)
    return [f"{', '.join(name for name, row in rows.items() if row[1] == one)}: {one}" for one in reasons]


def publish(name: str, words: Sequence[str]) -> None:
    """The command line; figures lie in experiments/published of the folder that was given, or of the first run.

    Raises:
        ConfigError: no runs, or settings that cannot be used.
        RunError: no run can be measured.
    """
    settings = overrides(words)
    one, several, out = (settings.pop(key, None) for key in ("run", "runs", "out"))
    if (one is None) == (several is None) or not isinstance(one or several, str):
        raise ConfigError(
            f"give run=outputs/RUN, or runs=: python -m sniffer.experiments {name} runs=outputs/SWEEP, or "
            "runs=[outputs/A,outputs/B]"
        )
    study = make(name, settings)
    assert isinstance(study, Published)
    given = paths(str(several)) if one is None else [str(one)]
    found = members(given) if one is None else [_member(given[0])]
    place = folder_at(given[0]) if len(given) == 1 else found[0].run.folder
    folder = destination(out, place, name)
    result = study.measure(found)
    results.write(result, folder, results.of_runs(study, {one.label: one.run for one in found}))
    for sentence in result.findings:
        say(sentence)
    say(folder, style="bold")


def _member(path: str) -> Member:
    """A run alone.

    Raises:
        ConfigError: there are several.
    """
    found = open_run(path)
    if not isinstance(found, Run):
        raise ConfigError(f"{path} has several runs: write runs={path}")
    model = found.manifest.model
    checkpoint, revision = str(model.get("checkpoint", "?")), model.get("revision")
    label = checkpoint.rstrip("/").rpartition("/")[2] or checkpoint
    return Member(found, label, checkpoint, None if revision is None else str(revision), frozenset({label}))
