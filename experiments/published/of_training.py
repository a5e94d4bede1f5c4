"""Figures over a training: runs in order, by steps where revisions name them, else as they were given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.figures import BLUE, ORANGE, canvas
from ..position_geometry.pca import TAXONOMY
from .of_models import Runs, below, mean, mean_of, panels, thresholds
from .studied import Studied

COLOURS = dict(zip(TAXONOMY, ("#0072b2", "#5f4b8b", "#cc79a7", "#009e73", "#bbbbbb"), strict=True))
SHOWN = 6
"""Panels of the phase portraits."""


def in_order(axes: Axes, runs: Runs) -> None:
    """Labels below, and a line wherever a phase of the training ends."""
    axes.set_xticks(range(len(runs)), [run.label for run in runs], rotation=30, ha="right", fontsize=8)
    for place in range(1, len(runs)):
        if runs[place].phase != runs[place - 1].phase:
            axes.axvline(place - 0.5, color="grey", linestyle="--", linewidth=0.8)
    axes.grid(alpha=0.3, axis="y")


def _band(axes: Axes, runs: Runs, name: str, label: str, colour: str, marker: str) -> None:
    """The mean over heads, and their standard deviation to either side."""
    columns = [run.geometry["heads"][name].to_numpy() for run in runs]
    mean, spread = np.array([one.mean() for one in columns]), np.array([one.std() for one in columns])
    axes.plot(range(len(runs)), mean, color=colour, marker=marker, label=label)
    axes.fill_between(range(len(runs)), mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def position_signal(runs: Runs) -> Figure:
    figure, axes = canvas("position on the leading component: mean over heads, and one standard deviation", 7.5)
    _band(axes, runs, "pc1_r_q", "r of q", BLUE, "o")
    _band(axes, runs, "pc1_r_k", "r of k", ORANGE, "s")
    in_order(axes, runs)
    axes.set_ylabel("r with position")
    axes.legend(fontsize=8)
    return figure


def explained_evolution(runs: Runs) -> Figure:
    figure, axes = canvas("variance on the leading component: mean over heads, and one standard deviation", 7.5)
    _band(axes, runs, "pc1_explained", "explained", "#7b5ea7", "o")
    in_order(axes, runs)
    axes.set_ylabel("share of variance")
    return figure


def taxonomy_evolution(runs: Runs) -> Figure:
    figure, axes = canvas("heads by the taxonomy of the notes", 7.5)
    base = np.zeros(len(runs))
    for name in TAXONOMY:
        share = np.array([mean(run.geometry["heads"]["taxonomy_notes"] == name) for run in runs])
        axes.bar(range(len(runs)), share, bottom=base, color=COLOURS[name], label=name)
        base += share
    in_order(axes, runs)
    axes.set(ylabel="share of heads", ylim=(0, 1))
    below(axes)
    return figure


def phase_portraits(runs: Runs) -> Figure:
    """Of more than SHOWN runs, so many evenly spaced ones, the first and the last among them."""
    some = [
        runs[place] for place in np.unique(np.linspace(0, len(runs) - 1, min(SHOWN, len(runs))).round().astype(int))
    ]
    figure, axes = panels(len(some), "position on the leading component, a point per head")
    for one, run in zip(axes, some, strict=True):
        heads = run.geometry["heads"]
        one.scatter(heads["pc1_r_q"], heads["pc1_r_k"], s=7, alpha=0.6, color=BLUE)
        thresholds(one)
        one.set_title(run.label, fontsize=9)
        one.set(xlabel="r of q", ylabel="r of k")
    return figure


def _phases(runs: Runs) -> list[tuple[float, float, float, float]]:
    """A colour per run, the same for all of a phase."""
    names = list(dict.fromkeys(run.phase for run in runs))
    return [colormaps["tab10"](names.index(run.phase) % 10) for run in runs]


def _quartiles(axes: Axes, runs: Runs, values: Sequence[np.ndarray], title: str) -> None:
    """Bars of the mean over heads, with the quartiles."""
    mean = np.array([one.mean() for one in values])
    low, high = (np.array([np.quantile(one, cut) for one in values]) for cut in (0.25, 0.75))
    reach = np.clip(np.stack([mean - low, high - mean]), 0, None)
    axes.bar(range(len(runs)), mean, color=_phases(runs), yerr=reach, capsize=3, error_kw={"linewidth": 0.8})
    in_order(axes, runs)
    axes.set_title(title, fontsize=9)


def _column(run: Studied, value: pl.Expr) -> np.ndarray:
    return run.geometry["heads"].select(value.cast(pl.Float64)).to_series().to_numpy()


def trajectory(runs: Runs) -> Figure:
    figure, axes = panels(4, "the planar model over the runs: mean over heads, and quartiles", columns=2, width=4.4)
    wanted = {
        "|r| of k on the drift axis": pl.col("r_k").abs(),
        "separation strength": pl.col("separation_strength_notes"),
        "bias strength, times 1000": pl.col("bias_strength") * 1000,
        "share of variance on the plane": pl.col("variance_a") + pl.col("variance_b"),
    }
    for one, (title, value) in zip(axes, wanted.items(), strict=True):
        _quartiles(one, runs, [_column(run, value) for run in runs], title)
    return figure


def bias_decomposition(runs: Runs) -> Figure:
    figure, axes = panels(3, "bias strength and its two factors: mean over heads")
    wanted = {
        "mean of q on the drift axis": pl.col("mu_q_a"),
        "slope of k per position, times 1000": pl.col("alpha_k") * 1000,
        "bias strength, times 1000": pl.col("bias_strength") * 1000,
    }
    for one, (title, value) in zip(axes, wanted.items(), strict=True):
        one.bar(range(len(runs)), [_column(run, value).mean() for run in runs], color=_phases(runs))
        in_order(one, runs)
        one.axhline(0, color="black", linewidth=0.6)
        one.set_title(title, fontsize=9)
    return figure


def plasticity_trajectory(runs: Runs) -> Figure:
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.3])
    above.set_title("plasticity and bias over the runs: means over heads", fontsize=10)
    first, last = ([mean(run.plasticity["heads"][name]) for run in runs] for name in ("first", "last"))
    at = range(len(runs))
    above.plot(at, first, "o-", color=BLUE, label="first fifth of the context")
    above.plot(at, last, "s-", color=ORANGE, label="last fifth")
    above.fill_between(at, last, first, color="#762a83", alpha=0.15, label="drop")
    above.set_ylabel("plasticity")
    above.legend(fontsize=8)
    below.bar(at, [mean_of(run, "bias_strength") for run in runs], color="#009e73", width=0.6)
    below.set_ylabel("bias strength")
    for one in (above, below):
        in_order(one, runs)
    return figure
