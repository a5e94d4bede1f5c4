"""Figures of plasticity: by distances, over positions, against scores; and where queries keep their position."""

from __future__ import annotations

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.figure import Figure

from sniffer.errors import ConfigError

from ..common.figures import BLUE, canvas
from ..compare.scores import read_scores
from .of_models import Runs, mean, panels

FEWEST = 3
"""Runs from which on a line through their scores says something."""


def bucket_heatmap(runs: Runs) -> Figure:
    """Panels share the colours, so that runs can be told apart by them."""
    figure, axes = panels(len(runs), "plasticity by distances: mean over heads and pairs of keys", 2, 4.2, 3.6)
    every = [run.cells for run in runs]
    low, high = (float(take([take(matrix[np.isfinite(matrix)]) for matrix, _ in every])) for take in (np.min, np.max))
    for one, run, (matrix, longest) in zip(axes, runs, every, strict=True):
        image = one.imshow(
            matrix, origin="lower", aspect="auto", cmap="inferno", vmin=low, vmax=high, extent=(0, longest, 0, longest)
        )
        one.set_title(run.label, fontsize=9)
        one.set(xlabel="tokens between the two keys", ylabel="tokens from their middle to the query")
    figure.colorbar(image, ax=axes, label="plasticity: 1, content decides")
    return figure


def profile(runs: Runs) -> Figure:
    figure, axes = panels(len(runs), "plasticity of each head over positions; mean of heads in red")
    for one, run in zip(axes, runs, strict=True):
        curves = run.plasticity["profile"]
        for _, head in curves.group_by("layer", "head", maintain_order=True):
            some = head.sort("query_position")
            one.plot(some["query_position"], some["plasticity"], color="grey", alpha=0.2, linewidth=0.6)
        mean = curves.group_by("query_bucket").agg(pl.col("query_position", "plasticity").mean()).sort("query_bucket")
        one.plot(mean["query_position"], mean["plasticity"], "o-", color="red", linewidth=2, markersize=3)
        one.set_title(run.label, fontsize=9)
        one.set(xlabel="position of the query", ylabel="plasticity", ylim=(0, 1.02))
        one.grid(alpha=0.3)
    return figure


def component_weights(runs: Runs) -> Figure:
    figure, axes = panels(
        len(runs), "where queries keep their position: weight of each dimension (mean over heads)", 2, 6.5, 3.0
    )
    for one, run in zip(axes, runs, strict=True):
        some = run.geometry["dimensions"].filter(kind="q").group_by("dimension").agg(pl.col("weight").mean())
        some = some.sort("dimension")
        one.bar(some["dimension"], some["weight"], color=BLUE, width=1.0)
        one.set_title(run.label, fontsize=9)
        one.set(xlabel="dimension", ylabel="share of positional information")
    return figure


def drop_vs_score(runs: Runs, path: str | None) -> Figure:
    """Raises ConfigError without scores, or where they name fewer than two of the runs."""
    if path is None:
        raise ConfigError("it takes scores=FILE.csv, with a column run and one of scores")
    scores, _ = read_scores(path, [run.member for run in runs])
    name = str(scores["score"][0])
    value = dict(scores.filter(score=name).select("run", "value").iter_rows())
    some = [run for run in runs if run.label in value and run.plasticity["heads"]["drop"].is_not_null().any()]
    if len(some) < 2:
        raise ConfigError(
            f"{len(some)} of the runs have a score in {path} and queries in the first and the last fifth of a context, "
            "and it takes two"
        )
    x = np.array([mean(run.plasticity["heads"]["drop"]) for run in some])
    y = np.array([value[run.label] for run in some])
    told = f": r = {np.corrcoef(x, y)[0, 1]:+.2f}" if len(some) >= FEWEST else ""
    figure, axes = canvas(f"{name} against what plasticity loses{told}", 6.0)
    kinds = list(dict.fromkeys(run.family for run in some))
    for kind in kinds:
        mine = [place for place, run in enumerate(some) if run.family == kind]
        axes.scatter(x[mine], y[mine], color=colormaps["tab10"](kinds.index(kind) % 10), s=50, label=kind)
    for place, run in enumerate(some):
        axes.annotate(run.label, (x[place], y[place]), textcoords="offset points", xytext=(6, 4), fontsize=8)
    if len(some) >= FEWEST and np.ptp(x) > 0:
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), "--", color="grey", linewidth=1)
    axes.margins(0.3, 0.15)
    axes.set(xlabel="plasticity of the first fifth minus the last", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
