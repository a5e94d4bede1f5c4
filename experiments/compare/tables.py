"""What runs are compared by, as tidy tables: of runs, of heads, by depth, as histograms, by names of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float64

from .intervals import spread_of, spread_of_difference
from .measured import PLACE, Measured
from .members import Member

Key = tuple[str, str, str]
"""analysis, statistic, kind."""
OF_HEADS = {**dict.fromkeys(("run", *PLACE[:3]), pl.String), "layer": pl.Int32, "head": pl.Int32}


@dataclass(frozen=True)
class Compared:
    """The runs that could be measured, in order, with what was measured; `baseline` is one of their labels."""

    members: tuple[Member, ...]
    measured: Mapping[str, Measured]
    baseline: str
    average: str
    level: float

    def paired(self, label: str) -> bool:
        """Whether a run and the baseline have the same documents, and so the same groups."""
        one, other = self.measured[self.baseline].dealt, self.measured[label].dealt
        return one is not None and one == other

    def average_of(self, label: str, key: Key) -> tuple[np.ndarray, np.ndarray]:
        """Of all heads of a run, and of each group of its documents, as one number."""
        heads, groups = self.measured[label].of(*key)
        return self.averaged(heads["value"].to_numpy().astype(np.float64))[None], self.averaged(groups)[None]

    def averaged(self, values: Float64[np.ndarray, " *shape"]) -> np.ndarray:
        """Over the heads that have a number."""
        with np.errstate(invalid="ignore"):
            some = values[~np.isnan(values).all(axis=tuple(range(1, values.ndim)))]
            if not len(some):
                return np.full(values.shape[1:], np.nan)
            return np.asarray((np.nanmean if self.average == "mean" else np.nanmedian)(some, axis=0))


def runs_table(found: Compared, keys: Sequence[Key]) -> pl.DataFrame:
    """A row per run and statistic: its average over heads, from and to, and the difference from the baseline's."""
    rows = []
    for key in keys:
        base = found.average_of(found.baseline, key)
        for member in found.members:
            mine = found.average_of(member.label, key)
            reach = spread_of(*mine).reach(found.level)
            difference = mine[0] - base[0]
            apart = spread_of_difference(base, mine, found.paired(member.label)).reach(found.level)
            if member.label == found.baseline:
                difference = apart = np.full(1, np.nan)
            numbers = (mine[0], mine[0] - reach, mine[0] + reach, difference, difference - apart, difference + apart)
            heads = found.measured[member.label].of(*key)[0]["value"].count()
            rows.append((member.label, *key, heads, *(float(number[0]) for number in numbers)))
    schema = {
        **dict.fromkeys(("run", *PLACE[:3]), pl.String),
        "heads": pl.Int64,
        **dict.fromkeys(("value", "low", "high", "difference", "difference_low", "difference_high"), pl.Float64),
    }
    told = pl.DataFrame(
        {
            "run": [member.label for member in found.members],
            "checkpoint": [member.checkpoint for member in found.members],
            "revision": pl.Series([member.revision for member in found.members], dtype=pl.String),
            "folder": [member.run.folder.name for member in found.members],
        }
    )
    table = pl.DataFrame(rows, schema=schema, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))
    return table.join(told, on="run", how="left", maintain_order="left")


def differences_table(found: Compared, keys: Sequence[Key]) -> pl.DataFrame:
    """A row per head that a run and the baseline both have: its two values, their difference, from and to.

    `differs`: the interval leaves 0 out; null where there is none.
    """
    frames = [
        _difference(found, member.label, key)
        for member in found.members
        for key in keys
        if member.label != found.baseline and same_heads(found, member)
    ]
    schema = {**OF_HEADS, **dict.fromkeys(("baseline", "value", "difference", "low", "high"), pl.Float64)}
    return pl.concat([pl.DataFrame(schema={**schema, "differs": pl.Boolean}), *frames])


def same_heads(found: Compared, member: Member) -> bool:
    """Whether a run's model has the layers and heads of the baseline's, so that a head is the same head in both."""
    base = next(one for one in found.members if one.label == found.baseline)
    shapes = [
        {layer.layer: (dict(layer.heads), dict(layer.dims)) for layer in one.run.manifest.geometry}
        for one in (base, member)
    ]
    return shapes[0] == shapes[1]


def _difference(found: Compared, label: str, key: Key) -> pl.DataFrame:
    (base, base_groups), (mine, groups) = (found.measured[one].of(*key) for one in (found.baseline, label))
    both = base.with_row_index("at").join(mine.with_row_index("at_other"), on=PLACE, suffix="_other").sort("at")
    one, other = base_groups[both["at"].to_numpy()], groups[both["at_other"].to_numpy()]
    values = [both[name].to_numpy().astype(np.float64) for name in ("value", "value_other")]
    sides = (values[0], one), (values[1], other)
    reach = spread_of_difference(*sides, found.paired(label)).reach(found.level)
    difference = values[1] - values[0]
    low, high = difference - reach, difference + reach
    return both.select(
        pl.lit(label).alias("run"),
        *PLACE,
        pl.col("value").alias("baseline"),
        pl.col("value_other").alias("value"),
        pl.Series("difference", difference),
        pl.Series("low", low),
        pl.Series("high", high),
        pl.Series(
            "differs",
            [None if np.isnan(reach) else bool(a > 0 or b < 0) for a, b, reach in zip(low, high, reach, strict=True)],
            dtype=pl.Boolean,
        ),
    ).with_columns(pl.col("difference", "low", "high").fill_nan(None))


def depth_table(found: Compared, keys: Sequence[Key], bins: int) -> pl.DataFrame:
    """A row per run, statistic and stretch of depth: 0 is the first layer, 1 the last, however many there are."""
    frames = []
    for member in found.members:
        depth = (pl.col("layer") / max(1, member.deepest)).alias("depth")
        for key in keys:
            heads, _ = found.measured[member.label].of(*key)
            stretch = (depth * bins).floor().clip(upper_bound=bins - 1).cast(pl.Int32).alias("bin")
            average = pl.col("value").mean() if found.average == "mean" else pl.col("value").median()
            frames.append(
                heads.group_by(stretch)
                .agg(depth.mean(), average, pl.col("value").count().cast(pl.Int64).alias("heads"))
                .sort("bin")
                .select(
                    pl.lit(member.label).alias("run"),
                    *(pl.lit(word).alias(name) for name, word in zip(PLACE[:3], key, strict=True)),
                    "bin",
                    "depth",
                    "value",
                    "heads",
                )
            )
    return pl.concat(frames)


def histogram_table(found: Compared, keys: Sequence[Key], bins: int) -> pl.DataFrame:
    """A row per run, statistic and bin: how many heads lie from `low` to `high`; bins are the same for all runs."""
    frames = []
    for key in keys:
        values = {one.label: _finite(found.measured[one.label].of(*key)[0]) for one in found.members}
        every = np.concatenate(list(values.values()))
        if not len(every):
            continue
        edges = np.histogram_bin_edges(every, bins)
        for label, mine in values.items():
            counts, _ = np.histogram(mine, edges)
            named = {"run": [label] * bins, **{name: [word] * bins for name, word in zip(PLACE[:3], key, strict=True)}}
            frames.append(
                pl.DataFrame({**named, "low": edges[:-1], "high": edges[1:], "heads": counts.astype(np.int64)})
            )
    return pl.concat(frames) if frames else pl.DataFrame(schema={"run": pl.String})


def _finite(heads: pl.DataFrame) -> np.ndarray:
    values = heads["value"].to_numpy().astype(np.float64)
    return values[np.isfinite(values)]


def names_table(found: Compared) -> pl.DataFrame:
    """A row per run, column of words (such as the taxonomy) and word: how many heads, and their share."""
    frames = [
        found.measured[one.label]
        .names.drop_nulls("value")
        .select(pl.lit(one.label).alias("run"), *PLACE[:3], pl.col("value").alias("name"))
        for one in found.members
    ]
    of_run = ["run", *PLACE[:3]]
    counts = (
        pl.concat(frames).group_by(*of_run, "name", maintain_order=True).agg(pl.len().cast(pl.Int64).alias("heads"))
    )
    return counts.with_columns((pl.col("heads") / pl.col("heads").sum().over(of_run)).alias("share"))
