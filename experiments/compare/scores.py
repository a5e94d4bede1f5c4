"""A user's own scores of the runs, from a CSV file: a column `run`, and a column of numbers for each benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from sniffer.errors import ConfigError, first_line

from .intervals import pearson, spearman
from .members import Member
from .tables import Key


def read_scores(path: str, members: Sequence[Member]) -> tuple[pl.DataFrame, list[str]]:
    """run (labels), score (the column's name), value; and what could not be joined, in sentences.

    Raises:
        ConfigError: no such file, no column `run` or none of numbers, a row that names several runs or a run twice, or
            not one row that names a run.
    """
    file = Path(path).expanduser()
    try:
        table = pl.read_csv(file, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"scores={path} cannot be read as CSV: {first_line(error)}") from error
    names = [name for name in table.columns if name != "run" and table.schema[name].is_numeric()]
    if "run" not in table.columns or not names:
        raise ConfigError(
            f"scores={path} has columns {', '.join(table.columns)}: it wants `run`, and one or more of numbers"
        )
    called: dict[str, str] = {}
    unknown = []
    for name in table["run"].cast(pl.String).drop_nulls().to_list():
        meant = [member.label for member in members if name in member.names]
        if len(meant) > 1:
            raise ConfigError(f"scores={path} says {name}, which could be {', '.join(meant)}: use these names")
        if not meant:
            unknown.append(name)
        elif meant[0] in called.values():
            raise ConfigError(f"scores={path} has two rows for {meant[0]}: keep one")
        else:
            called[name] = meant[0]
    if not called:
        labels = ", ".join(member.label for member in members)
        raise ConfigError(f"scores={path} names none of the runs: they are {labels}")
    labelled = pl.DataFrame({"run": list(called), "label": list(called.values())})
    joined = table.with_columns(pl.col("run").cast(pl.String)).join(labelled, on="run")
    long = joined.unpivot(names, index="label", variable_name="score", value_name="value").drop_nulls("value")
    said = []
    if unknown:
        said.append(f"Of the scores these name no run here: {', '.join(unknown)}.")
    if without := [member.label for member in members if member.label not in called.values()]:
        said.append(f"These runs have no score: {', '.join(without)}.")
    return long.rename({"label": "run"}).with_columns(pl.col("value").cast(pl.Float64)), said


def correlations(runs: pl.DataFrame, scores: pl.DataFrame, keys: Sequence[Key], level: float) -> pl.DataFrame:
    """A row per score and statistic: how the runs' averages go with it, by Pearson's r and Spearman's."""
    rows = []
    for score in scores["score"].unique(maintain_order=True):
        of_score = scores.filter(score=score).select("run", pl.col("value").alias("score_value"))
        for analysis, statistic, kind in keys:
            mine = runs.filter(analysis=analysis, statistic=statistic, kind=kind).join(of_score, on="run")
            pairs = mine.select("value", "score_value").drop_nulls().to_numpy().astype(np.float64)
            found = [way(pairs[:, 0], pairs[:, 1], level) for way in (pearson, spearman)]
            rows.append(
                (
                    score,
                    analysis,
                    statistic,
                    kind,
                    len(pairs),
                    *(number for one in found for number in (one.r, one.low, one.high)),
                )
            )
    numbers = [f"{way}{end}" for way in ("pearson", "spearman") for end in ("", "_low", "_high")]
    schema = {
        **dict.fromkeys(("score", "analysis", "statistic", "kind"), pl.String),
        "runs": pl.Int64,
        **dict.fromkeys(numbers, pl.Float64),
    }
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))
