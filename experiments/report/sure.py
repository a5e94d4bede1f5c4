"""How sure numbers of a result are: what they are of, and intervals of each head's and of the median over heads.

An analysis that left intervals is believed. Of any other, groups of documents are measured alone with its settings
(`experiments.common.documents`), if its result is of the rows that the run has now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from sniffer.config.resolve import conf_folder
from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.storage.untrusted import CONFIG_BYTES, read_json

from ..common.documents import deal
from ..common.entry import Analysis, make, progress
from ..common.results import PROVENANCE, middle
from ..compare.intervals import spread_of
from ..compare.measured import PLACE, groups_of, numbers, steps
from .reading import read_table

LEVEL = 0.95
Cell = tuple[int, int]
"""layer, head."""


@dataclass(frozen=True)
class Sure:
    """`heads` and `medians`: from and to, by (statistic, kind); `how`: where intervals come from, in words."""

    heads: Mapping[tuple[str, str], Mapping[Cell, tuple[float, float]]] = field(default_factory=dict)
    medians: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    how: str = ""


def sure_of(folder: Path, run: Run, groups: int) -> Sure:
    """Of one folder of results, whose table of heads is there."""
    own = folder / "intervals.parquet"
    left = _left(read_table(own)) if own.is_file() else Sure()
    analysis = _analysis(folder, run)
    dealt = None if analysis is None else deal(run, groups, 0)
    if analysis is None or dealt is None:
        return left
    bar = progress(range(steps(run, {folder.name: analysis})), f"how sure {folder.name.replace('_', ' ')} is")
    try:
        again = groups_of(run, folder.name, analysis, dealt, lambda: next(bar, None))
    except RunError:
        return left
    heads = numbers(folder.name, read_table(folder / "heads.parquet"))
    found = _measured(heads, again, len(dealt.groups), len(dealt.documents))
    if not left.heads:
        return found
    return Sure(left.heads, found.medians, f"of medians in tables {found.how}; of sentences and heads {left.how}")


def _measured(heads: pl.DataFrame, again: pl.DataFrame, groups: int, documents: int) -> Sure:
    columns = [f"group_{number}" for number in range(groups)]
    wide = heads.join(again, on=PLACE, how="inner", maintain_order="left").drop_nulls("value")
    by_head: dict[tuple[str, str], dict[Cell, tuple[float, float]]] = {}
    medians = {}
    for (statistic, kind), some in wide.group_by("statistic", "kind", maintain_order=True):
        value = some["value"].to_numpy().astype(np.float64)
        of_groups = some.select(pl.col(columns).fill_null(np.nan)).to_numpy().astype(np.float64)
        key = str(statistic), str(kind)
        reach = spread_of(value, of_groups).reach(LEVEL)
        by_head[key] = {
            (layer, head): (one - far, one + far)
            for layer, head, one, far in zip(some["layer"], some["head"], value, reach, strict=True)
            if np.isfinite(far)
        }
        measured = of_groups[np.isfinite(of_groups).all(1)]
        if len(measured) == len(value):
            middle = np.median(value)
            far = spread_of(middle[None], np.median(measured, axis=0)[None]).reach(LEVEL)[0]
            medians[key] = (float(middle - far), float(middle + far))
    return Sure(
        by_head, medians, f"{LEVEL:.0%} intervals, from {documents} documents in {groups} groups, each measured alone"
    )


def _left(table: pl.DataFrame) -> Sure:
    """Intervals that an analysis left: per head and statistic."""
    by_head = {
        (str(statistic), ""): {
            (layer, head): (low, high)
            for layer, head, low, high in some.select("layer", "head", "low", "high").iter_rows()
        }
        for (statistic,), some in table.drop_nulls(["low", "high"])
        .filter(pl.col("low").is_not_nan())
        .group_by("statistic")
    }
    return Sure(by_head, {}, "as the analysis left them, by resampling documents" if by_head else "")


def _analysis(folder: Path, run: Run) -> Analysis | None:
    """As it was set when it left the result; None where that is not known, or the run has other rows by now."""
    try:
        provenance = read_json(folder / PROVENANCE, CONFIG_BYTES)
        defaults = yaml.safe_load((conf_folder() / "analysis" / f"{folder.name}.yaml").read_text(encoding="utf-8"))
        settings: dict[str, Any] = dict(provenance["settings"])
        # What runs is said by our own configuration; a result may come from anyone.
        known = {key: value for key, value in settings.items() if key in defaults and not key.startswith("_")}
        return make(folder.name, known) if provenance["run_digest"] == run.manifest.digest else None
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None


def basis(heads: pl.DataFrame, run: Run, how: str) -> str:
    """What numbers of a table of heads are of, in a sentence."""
    count, layers = heads.select("layer", "head").unique().height, heads["layer"].n_unique()
    told = [f"{count} heads of {layers} layers", *_rows(heads, run)]
    counts = run.manifest.counts
    told.append(f"{counts.get('examples', 0):,} documents, {counts.get('tokens', 0):,} tokens")
    return f"{'; '.join(told)}. " + (f"Brackets: {how}." if how else "No intervals.")


def _rows(heads: pl.DataFrame, run: Run) -> Iterator[str]:
    """Rows per head: as the table says, else of each kind that the run has."""
    named = {"rows_q": "queries", "rows_k": "keys", "rows": "rows"}
    found = [f"{middle(heads[name]):,.0f} {word}" for name, word in named.items() if name in heads.columns]
    if not found:
        selected = run.manifest.selection
        of_kind = {kind: sum(len(selected[layer].get(kind, ())) for layer in run.layers) for kind in run.kinds}
        found = [
            f"{rows / of_kind[kind]:,.0f} {kind}"
            for kind, rows in run.manifest.rows_by_kind.items()
            if of_kind.get(kind)
        ]
    if found:
        yield f"{', '.join(found)} per head"
