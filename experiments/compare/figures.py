"""Figures of a comparison: runs side by side, head by head, by depth, over a training, and against scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.figures import BLUE, canvas, grid, label_ticks
from .members import Course
from .tables import Key

MAPS = 12
"""Maps of differences that fit in a figure."""


def label_of(key: Key) -> str:
    analysis, statistic, kind = key
    return statistic.replace("_", " ") + (f" of {kind}" if kind else "")


def file_of(prefix: str, key: Key) -> str:
    return "_".join(part for part in (prefix, *key) if part)


def of_key(table: pl.DataFrame, key: Key) -> pl.DataFrame:
    return table.filter(analysis=key[0], statistic=key[1], kind=key[2])


def runs_figure(runs: pl.DataFrame, key: Key, average: str, level: float) -> Figure:
    """A dot per run, with its interval."""
    some = of_key(runs, key).reverse()
    figure, axes = canvas(f"{label_of(key)}: {average} over heads, {level:.0%} intervals", 6.5, 1.4 + 0.3 * len(some))
    _dots(axes, some["value"], some["low"], some["high"], range(len(some)), across=True)
    axes.set_yticks(range(len(some)), some["run"].to_list())
    axes.set_ylim(-0.6, len(some) - 0.4)
    axes.grid(alpha=0.3)
    return figure


def trajectory_figure(runs: pl.DataFrame, key: Key, course: Course, average: str, level: float) -> Figure:
    """The average over heads against the steps of training, or its revisions in order."""
    order = pl.DataFrame({"run": [member.label for member in course.members], "x": course.x})
    some = order.join(of_key(runs, key), on="run", how="left", maintain_order="left")
    figure, axes = canvas(f"{label_of(key)} over training: {average} over heads, {level:.0%} intervals")
    _dots(axes, some["value"], some["low"], some["high"], some["x"].to_list(), across=False)
    axes.plot(some["x"], some["value"].to_numpy(), color=BLUE)
    if course.steps:
        axes.set_xlabel("steps of training")
    else:
        labels = [str(member.revision) for member in course.members]
        axes.set_xticks(list(course.x), labels, rotation=40, ha="right", fontsize=8)
        axes.set_xlabel("revision, in the order given")
    axes.set_ylabel(label_of(key))
    axes.grid(alpha=0.3)
    return figure


def _dots(axes: Axes, value: pl.Series, low: pl.Series, high: pl.Series, at: Sequence[float], *, across: bool) -> None:
    middle, bottom, top = (one.cast(pl.Float64).to_numpy() for one in (value, low, high))
    reach = np.nan_to_num(np.stack([middle - bottom, top - middle]))
    x, y = (middle, at) if across else (at, middle)
    axes.errorbar(x, y, **{"xerr" if across else "yerr": reach}, fmt="o", markersize=4, capsize=3, color=BLUE)


def differences_figure(differences: pl.DataFrame, key: Key, baseline: str) -> Figure | None:
    """A map of layers by heads per run, on one scale; heads whose interval leaves 0 out have a dot."""
    some = of_key(differences, key)
    labels = some["run"].unique(maintain_order=True).to_list()[:MAPS]
    if not labels or not some["difference"].is_not_null().any():
        return None
    columns = min(4, len(labels))
    rows = -(-len(labels) // columns)
    figure = Figure(figsize=(1 + 2.6 * columns, 1 + 2.6 * rows), layout="constrained")
    figure.suptitle(f"{label_of(key)} minus that of {baseline}; dots: the interval leaves 0 out", fontsize=10)
    limit = float(np.nanmax(np.abs(some["difference"].cast(pl.Float64).to_numpy()))) or 1.0
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, label in zip(panels, labels, strict=False):
        mine = some.filter(run=label)
        matrix, layers, heads = grid(mine, "difference")
        image = axes.imshow(
            matrix, aspect="auto", origin="lower", interpolation="nearest", cmap="RdBu_r", vmin=-limit, vmax=limit
        )
        marked = mine.filter("differs")
        axes.scatter(
            pl.Series(heads).search_sorted(marked["head"]),
            pl.Series(layers).search_sorted(marked["layer"]),
            s=3,
            c="black",
            linewidths=0,
        )
        label_ticks(axes, layers, heads)
        axes.set_title(label, fontsize=8)
        axes.set(xlabel="key head" if key[2] in ("k", "k_pre", "v") else "head", ylabel="layer")
    for axes in panels[len(labels) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=list(panels))
    return figure


def depth_figure(depths: pl.DataFrame, key: Key, average: str, labels: Sequence[str]) -> Figure:
    """A row per run, from its first layer to its last."""
    some = of_key(depths, key)
    bins = int(some["bin"].max() or 0) + 1  # type: ignore[arg-type]
    matrix = np.full((len(labels), bins), np.nan)
    for run, place, value in some.select("run", "bin", "value").iter_rows():
        matrix[labels.index(run), place] = np.nan if value is None else value
    figure, axes = canvas(f"{label_of(key)} by depth: {average} over heads", 7, 1.6 + 0.3 * len(labels))
    signed = bool((matrix < 0).any() and (matrix > 0).any())
    limit = float(np.nanmax(np.abs(matrix))) if np.isfinite(matrix).any() else 1.0
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "viridis"}
    image = axes.imshow(matrix, aspect="auto", interpolation="nearest", extent=(0, 1, len(labels) - 0.5, -0.5), **scale)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("depth: 0 is the first layer, 1 the last")
    figure.colorbar(image, ax=axes)
    return figure


def histogram_figure(histograms: pl.DataFrame, key: Key, labels: Sequence[str]) -> Figure:
    """The share of heads per bin, a row per run, on one scale; zero is marked where there is some of both signs."""
    some = of_key(histograms, key)
    figure = Figure(figsize=(6.5, 1.2 + 0.7 * len(labels)), layout="constrained")
    figure.suptitle(f"heads by {label_of(key)}", fontsize=10)
    panels = figure.subplots(len(labels), 1, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, label in zip(panels, labels, strict=True):
        mine = some.filter(run=label)
        heads = max(1, int(mine["heads"].sum()))
        low, high = mine["low"].to_numpy(), mine["high"].to_numpy()
        axes.bar(low, mine["heads"].to_numpy() / heads, high - low, align="edge", color=BLUE)
        if len(low) and low[0] < 0 < high[-1]:
            axes.axvline(0, color="black", linewidth=0.8)
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel(label_of(key))
    return figure


def names_figure(names: pl.DataFrame, statistic: str, labels: Sequence[str]) -> Figure:
    """Stacked shares of heads by name, a bar per run."""
    figure, axes = canvas(f"heads by {statistic.replace('_', ' ')}", 7, 2.0 + 0.35 * len(labels))
    colours = matplotlib.colormaps["tab10"]
    start = np.zeros(len(labels))
    for number, name in enumerate(names["name"].unique(maintain_order=True)):
        mine: Mapping[str, float] = dict(names.filter(name=name).select("run", "share").iter_rows())
        share = np.array([mine.get(label, 0.0) for label in labels])
        axes.barh(range(len(labels)), share, left=start, color=colours(number % 10), label=name)
        start += share
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="share of heads", xlim=(0, 1))
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    return figure


def scores_figure(runs: pl.DataFrame, scores: pl.DataFrame, key: Key, score: str, found: Mapping[str, float]) -> Figure:
    """A dot per run: its average against its score, with the least-squares line."""
    joined = of_key(runs, key).join(scores.filter(score=score).select("run", pl.col("value").alias("score")), on="run")
    both = joined.drop_nulls(["value", "score"])
    x, y = both["value"].to_numpy(), both["score"].to_numpy()
    told = "" if found["pearson"] is None else f"r = {found['pearson']:.2f}"
    if found["pearson_low"] is not None:
        told += f" [{found['pearson_low']:.2f}, {found['pearson_high']:.2f}]"
    figure, axes = canvas(f"{score} against {label_of(key)}: {told}")
    axes.scatter(x, y, color=BLUE, s=20)
    for label, a, b in zip(both["run"], x, y, strict=True):
        axes.annotate(label, (a, b), textcoords="offset points", xytext=(5, 3), fontsize=7)
    if len(x) > 1 and np.ptp(x) > 0:
        ends = np.array([x.min(), x.max()])
        slope, start = np.polyfit(x, y, 1)
        axes.plot(ends, start + slope * ends, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel=label_of(key), ylabel=score)
    axes.grid(alpha=0.3)
    return figure
