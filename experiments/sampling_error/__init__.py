"""What base_rate costs: bias and spread of every statistic under sampling; see README.md here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.sampler import Picker

from ..common.entry import progress
from ..common.results import Result, head_columns
from ..common.rows import WEIGHTS, LayerVectors, chosen_layers, key_places, load
from ..rope_frequencies.core import find_layout
from .resample import SAMPLERS, Population, make_sampler, require_every_position
from .statistics import statistics


@dataclass(frozen=True)
class SamplingError:
    """Samples a run that has every position, many times, and compares with what all positions say.

    Attributes:
        layers: as capture.layers; None for all.
        samplers: of uniform and log_uniform.
        base_rates: expected positions per bucket and document.
        bucket_size: of uniform, and the first bucket of log_uniform: a power of two.
        repeats: samples of each case, with the seeds from 0 on.
        tolerance: error that still tells heads apart, as a share of the spread between heads.
    """

    layers: Any = None
    samplers: list[str] = field(default_factory=lambda: list(SAMPLERS))
    base_rates: list[float] = field(default_factory=lambda: [1.0, 4.0, 16.0, 64.0])
    bucket_size: int = 128
    repeats: int = 4
    tolerance: float = 0.25

    def __post_init__(self) -> None:
        unknown = [name for name in self.samplers if name not in SAMPLERS]
        if unknown or not self.samplers:
            raise ConfigError(f"sampling_error.samplers={self.samplers} must name some of {', '.join(SAMPLERS)}")
        if not self.base_rates or min(self.base_rates) <= 0:
            raise ConfigError(f"sampling_error.base_rates={self.base_rates} must be rates above 0")
        if self.repeats < 2 or self.tolerance <= 0:
            raise ConfigError("sampling_error wants 2 repeats or more, and tolerance above 0")
        for name in self.samplers:
            make_sampler(name, 1.0, self.bucket_size)

    def measure(self, run: Run) -> Result:
        """Tables: errors (per case, head and statistic), summary (per case and statistic, over heads)."""
        require_every_position(run)
        layers = chosen_layers(run, self.layers, "q", "k")
        if sum(len(run.heads(layer, "q")) for layer in layers) < 2:
            raise RunError(
                f"{run.folder} has one query head here, and errors are told in shares of the spread between heads: "
                "take more layers, or capture more heads"
            )
        errors = pl.concat([self._layer(run, layer) for layer in progress(layers, "sampling error")])
        summary = summarise(errors)
        findings = _findings(summary, self.tolerance)
        return Result({"errors": errors, "summary": summary}, findings, _figures(summary, self.tolerance))

    def cases(self) -> Iterator[tuple[str, str, float]]:
        """Sampler, weights and base rate; a uniform sample weights all rows alike anyway."""
        for name in self.samplers:
            for weights in WEIGHTS if name == "log_uniform" else WEIGHTS[:1]:
                for base_rate in self.base_rates:
                    yield name, weights, base_rate

    def _layer(self, run: Run, layer: int) -> pl.DataFrame:
        queries, keys = load(run, layer, "q"), load(run, layer, "k")
        before, pairs = _before_rope(run, queries)
        places = key_places(run, queries, keys)
        everything = Population.of(queries)
        truth = statistics(queries, keys, places, len(everything), before, pairs)
        frames = []
        for name, weights, base_rate in self.cases():
            sampler = make_sampler(name, base_rate, self.bucket_size)
            found, sizes = [], []
            for seed in range(self.repeats):
                picker = Picker(sampler, seed)
                q, k = (everything.sample(rows, picker, rows.kind, weights) for rows in (queries, keys))
                q_pre = None if before is None else everything.sample(before, picker, "q", weights)
                found.append(statistics(q, k, places, len(everything), q_pre, pairs))
                sizes.append(len(q))
            frames.append(
                _errors(queries, truth, found).with_columns(
                    pl.lit(name).alias("sampler"),
                    pl.lit(weights).alias("weights"),
                    pl.lit(base_rate).alias("base_rate"),
                    pl.lit(float(np.mean(sizes))).alias("rows"),
                )
            )
        return pl.concat(frames)


def _before_rope(run: Run, queries: LayerVectors) -> tuple[LayerVectors | None, tuple[str, int]]:
    """The queries before RoPE and how it pairs dimensions; no queries where they were not captured or none turn."""
    if "q_pre" in run.manifest.selection[queries.layer]:
        before = load(run, queries.layer, "q_pre")
        with suppress(RunError):
            return before, find_layout(before, queries)
    return None, ("", 0)


def _errors(queries: LayerVectors, truth: dict[str, np.ndarray], found: list[dict[str, np.ndarray]]) -> pl.DataFrame:
    """Bias, spread and root mean square error of each statistic and head over the repeats."""
    frames = []
    for name, true in truth.items():
        values = np.stack([each[name] for each in found])
        bias = values.mean(0) - true
        rmse = np.sqrt(((values - true) ** 2).mean(0))
        columns = {"truth": true, "mean": values.mean(0), "bias": bias, "spread": values.std(0, ddof=1), "rmse": rmse}
        table = head_columns(queries.layer, queries.heads, **columns)
        frames.append(table.with_columns(pl.lit(name).alias("statistic")))
    return pl.concat(frames)


CASE = ("sampler", "weights", "base_rate", "statistic")


def summarise(errors: pl.DataFrame) -> pl.DataFrame:
    """Medians over heads per case and statistic.

    `relative_error` is the median root mean square error over the standard deviation of the truth between heads:
    below 1 heads can be told apart. It is null where too few rows were kept to work the statistic out.
    """
    measured = errors.with_columns(pl.col("mean", "bias", "spread", "rmse").fill_nan(None))
    return (
        measured.group_by(*CASE)
        .agg(
            pl.col("bias").median(),
            pl.col("spread").median(),
            pl.when(pl.col("rmse").null_count() * 2 <= pl.len()).then(pl.col("rmse").median()).alias("rmse"),
            pl.col("truth").std().alias("between_heads"),
            pl.col("rows").mean(),
        )
        .with_columns((pl.col("rmse") / pl.col("between_heads")).alias("relative_error"))
        .sort(*CASE)
    )


def _findings(summary: pl.DataFrame, tolerance: float) -> list[str]:
    said = []
    for (sampler, weights), case in summary.group_by("sampler", "weights", maintain_order=True):
        rows = dict(case.select("base_rate", "rows").unique().rows())
        needed = []
        for (name,), some in case.group_by("statistic", maintain_order=True):
            needed.append((enough_from(some, tolerance), str(name)))
        groups: dict[float, list[str]] = {}
        for rate, name in sorted(needed):
            groups.setdefault(rate, []).append(name)
        told = [
            f"base_rate {rate:g} ({rows[rate]:,.0f} rows a head) is enough for {', '.join(names)}"
            if np.isfinite(rate)
            else f"no rate tried is enough for {', '.join(names)}"
            for rate, names in groups.items()
        ]
        how = "" if sampler == "uniform" else f", weighted by {weights}"
        said.append(f"With {sampler}{how}, to tell heads apart: {'; '.join(told)}.")
    said.append(f"Enough means: an error of at most {tolerance:g} times the spread between heads, in the median head.")
    return said


def enough_from(case: pl.DataFrame, tolerance: float) -> float:
    """The lowest base rate from which on every rate tried keeps the tolerance; infinite if there is none."""
    rate = np.inf
    for row in case.sort("base_rate", descending=True).iter_rows(named=True):
        if row["relative_error"] is None or row["relative_error"] > tolerance:
            break
        rate = row["base_rate"]
    return rate


def _figures(summary: pl.DataFrame, tolerance: float) -> dict[str, Figure]:
    """One panel per sampler and weighting."""
    cases = summary.partition_by("sampler", "weights", maintain_order=True)
    figure = Figure(figsize=(4.2 * len(cases), 4.5), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases, strict=True):
        for (name,), some in case.group_by("statistic", maintain_order=True):
            axes.plot(some["base_rate"], some["relative_error"], marker="o", markersize=3, label=name)
        axes.axhline(tolerance, color="grey", linestyle=":")
        axes.set_xscale("log", base=2)
        # Where every sample has all rows, or heads do not differ, no error has a logarithm.
        if case["relative_error"].is_between(0, np.inf, closed="none").any():
            axes.set_yscale("log")
        axes.set_title(f"{case['sampler'][0]}, weighted by {case['weights'][0]}", fontsize=10)
        axes.set_xlabel("base_rate")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("error over the spread between heads")
    panels[-1].legend(fontsize=7)
    return {"sampling_error": figure}
