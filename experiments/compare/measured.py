"""What analyses say of a run and of each group of its documents, as one long table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import polars as pl
from jaxtyping import Float64

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run

from ..common.documents import Dealt, Portion, Source, deal
from ..common.entry import Analysis, Quick
from ..common.rows import chosen_layers

PLACE = ("analysis", "statistic", "kind", "layer", "head")
"""What tells numbers of one run apart; `kind` is empty where a statistic has one alone."""

NOT_STATISTICS = ("layer", "head", "key_head", "dim", "rows", "rows_q", "rows_k", "residual_r", "repeated")
SHARED_OUT = ("count", "searches")
"""Settings that say how much is drawn at random: groups share it, so that its noise weighs as it does in the whole."""
LEFT_OUT = {"resamples": 0, "points": 1, "shuffles": 1}
"""Settings of what a comparison has no use for."""


@dataclass(frozen=True)
class Measured:
    """Of one run: `heads` has PLACE and value; `groups` a row for each, nan where a group has no number, and no column
    where there are no groups. `names`: words for heads, such as their taxonomy, with PLACE and value.
    `without`: why there are no groups."""

    heads: pl.DataFrame
    groups: Float64[np.ndarray, "numbers groups"]
    names: pl.DataFrame
    dealt: Dealt | None
    without: str | None

    def of(self, analysis: str, statistic: str, kind: str) -> tuple[pl.DataFrame, Float64[np.ndarray, "heads groups"]]:
        chosen = (pl.col("analysis") == analysis) & (pl.col("statistic") == statistic) & (pl.col("kind") == kind)
        mask = self.heads.select(chosen).to_series().to_numpy()
        return self.heads.filter(chosen), self.groups[mask]


Step = Callable[[], object]


def measure(
    run: Run, analyses: Mapping[str, Analysis], wanted: list[str] | None, groups: int, seed: int, step: Step
) -> Measured:
    """Measures a run, and each group of its documents alone; `step` is called as `steps` counts.

    `wanted`: the statistics that are asked for, None for the main ones. Those that an analysis gives quickly are taken
    so; others, where it does, groups do not have.

    Raises:
        RunError: an analysis cannot measure the run, such as one with too few rows.
    """
    whole = {}
    for name, analysis in analyses.items():
        whole[name] = _heads(_settled(analysis), run, wanted)
        step()
    heads, names = (pl.concat([part(name, table) for name, table in whole.items()]) for part in (numbers, words))
    dealt = deal(run, groups, seed)
    if dealt is None:
        why = f"needs two documents or more, and has {len(run.examples())}" if groups > 1 else "was asked for none"
        return Measured(heads, np.empty((len(heads), 0)), names, None, why)
    try:
        again = [groups_of(run, name, analysis, dealt, step) for name, analysis in analyses.items()]
    except RunError as error:
        return Measured(heads, np.empty((len(heads), 0)), names, None, f"cannot be measured by groups: {error}")
    wide = heads.join(pl.concat(again), on=PLACE, how="left", maintain_order="left")
    columns = [f"group_{number}" for number in range(len(dealt.groups))]
    values = wide.select(pl.col(columns).fill_null(np.nan)).to_numpy()
    return Measured(heads, values, names, dealt, None)


def steps(run: Run, analyses: Mapping[str, Analysis]) -> int:
    """How often `measure` calls `step`."""
    return sum(1 + len(_layers(run, analysis)) for analysis in analyses.values())


def groups_of(run: Run, name: str, analysis: Analysis, dealt: Dealt, step: Step) -> pl.DataFrame:
    """PLACE and a column for each group; layer by layer, so that each is read once and no more is held."""
    share = _shared(_settled(analysis), len(dealt.groups))
    found = []
    for layer in _layers(run, analysis):
        source = Source(run)
        some = cast(Analysis, replace(cast(Any, share), layers=[layer]))
        tables = [numbers(name, _heads(some, Portion(source, ids), None)) for ids in dealt.groups]
        wide = tables[0].rename({"value": "group_0"})
        for number, table in enumerate(tables[1:], start=1):
            wide = wide.join(table.rename({"value": f"group_{number}"}), on=PLACE, how="full", coalesce=True)
        found.append(wide)
        step()
    return pl.concat(found)


def _heads(analysis: Analysis, run: Run, wanted: list[str] | None) -> pl.DataFrame:
    if isinstance(analysis, Quick):
        quick = analysis.quick(run)
        if set(wanted or ()) <= {*quick.columns}:
            return quick
    return analysis.measure(run).tables["heads"]


def _layers(run: Run, analysis: Analysis) -> list[int]:
    return chosen_layers(run, getattr(analysis, "layers", None))


def _settled(analysis: Analysis) -> Analysis:
    """Without what a comparison has no use for."""
    return _with(analysis, {key: value for key, value in LEFT_OUT.items() if hasattr(analysis, key)})


def _shared(analysis: Analysis, groups: int) -> Analysis:
    return _with(
        analysis, {key: max(1, getattr(analysis, key) // groups) for key in SHARED_OUT if hasattr(analysis, key)}
    )


def _with(analysis: Analysis, changes: Mapping[str, Any]) -> Analysis:
    return cast(Analysis, replace(cast(Any, analysis), **changes))


def numbers(analysis: str, heads: pl.DataFrame) -> pl.DataFrame:
    """Every column of numbers of a table of heads, one below the other."""
    wanted = [name for name in heads.columns if name not in NOT_STATISTICS and heads.schema[name].is_numeric()]
    return _long(analysis, heads, wanted, pl.Float64).with_columns(pl.col("value").fill_nan(None))


def words(analysis: str, heads: pl.DataFrame) -> pl.DataFrame:
    """Every column of words, such as the taxonomy."""
    wanted = [name for name, kind in heads.schema.items() if kind == pl.String and name != "kind"]
    return _long(analysis, heads, wanted, pl.String)


def _long(analysis: str, heads: pl.DataFrame, wanted: list[str], kind: Any) -> pl.DataFrame:
    of_kind = pl.col("kind") if "kind" in heads.columns else pl.lit("")
    return pl.concat(
        [
            heads.select(
                pl.lit(analysis).alias("analysis"),
                pl.lit(name).alias("statistic"),
                of_kind.cast(pl.String).alias("kind"),
                pl.col("layer", "head").cast(pl.Int32),
                pl.col(name).cast(kind).alias("value"),
            )
            for name in wanted
        ]
        or [
            pl.DataFrame(
                schema={**dict.fromkeys(PLACE[:3], pl.String), **dict.fromkeys(PLACE[3:], pl.Int32), "value": kind}
            )
        ]
    )


def statistics(found: pl.DataFrame) -> Iterator[tuple[str, str, str]]:
    """(analysis, statistic, kind) as they come."""
    yield from found.select(PLACE[:3]).unique(maintain_order=True).iter_rows()


def chosen(
    found: list[pl.DataFrame], wanted: list[str] | None, main: Mapping[str, list[str]]
) -> list[tuple[str, str, str]]:
    """The statistics to compare: those named, else the main ones of each analysis, else all of it.

    Raises:
        ConfigError: one that no run has; the message says which there are.
    """
    every = list(dict.fromkeys(one for heads in found for one in statistics(heads)))
    if wanted is None:
        return [one for one in every if one[1] in main.get(one[0], [one[1]])]
    known = {statistic for _, statistic, _ in every}
    for name in wanted:
        if name not in known:
            raise ConfigError(f"there is no statistic {name}: choose from {', '.join(sorted(known))}")
    return [one for name in wanted for one in every if one[1] == name]
