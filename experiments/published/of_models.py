"""Figures that set models beside one another: principal components, the planar model, their maps by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..common.figures import BLUE, ORANGE, canvas
from ..position_geometry.pca import HIGH, LOW, PUBLISHED
from .studied import Studied

GREY = "#999999"
DEPTHS = 10

Runs = Sequence[Studied]


def panels(
    count: int, title: str, columns: int = 3, width: float = 3.6, height: float = 3.2
) -> tuple[Figure, list[Axes]]:
    """So many axes side by side; three stay together."""
    across = 3 if count == 3 else min(count, columns)
    down = -(-count // across)
    figure = Figure(figsize=(max(5.0, across * width), 0.5 + down * height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = list(figure.subplots(down, across, squeeze=False).ravel())
    for one in axes[count:]:
        one.set_axis_off()
    return figure, axes[:count]


def beside(axes: Axes, labels: Sequence[str], bars: Mapping[str, tuple[Sequence[float], str]]) -> None:
    """Bars in groups: a group per label, a colour per name."""
    place, width = np.arange(len(labels)), 0.8 / len(bars)
    for number, (name, (values, colour)) in enumerate(bars.items()):
        axes.bar(place + (number - (len(bars) - 1) / 2) * width, values, width, color=colour, label=name)
    name_bars(axes, labels)
    axes.grid(alpha=0.3, axis="y")
    if len(bars) > 1:
        below(axes)


def name_bars(axes: Axes, labels: Sequence[str]) -> None:
    """Long labels lean, where there are several; a bar alone is no wall."""
    lean = len(labels) > 1 and max(map(len, labels)) > 6
    axes.set_xticks(range(len(labels)), labels, rotation=25 if lean else 0, ha="right" if lean else "center")
    if len(labels) == 1:
        axes.set_xlim(-1, 1)


def below(axes: Axes) -> None:
    """The legend, where it covers nothing."""
    assert isinstance(axes.figure, Figure)
    axes.figure.legend(loc="outside lower center", ncols=5, fontsize=8)


def families(runs: Runs) -> dict[str, list[Studied]]:
    found: dict[str, list[Studied]] = {}
    for run in runs:
        found.setdefault(run.family, []).append(run)
    return found


def heads_of(runs: Runs) -> pl.DataFrame:
    """The heads of several runs, one below the other."""
    return pl.concat([run.geometry["heads"] for run in runs], how="diagonal_relaxed")


def mean_of(run: Studied, name: str, *, absolute: bool = False) -> float:
    """Over the heads of a run."""
    values = run.geometry["heads"][name]
    return mean(values.abs() if absolute else values)


def mean(values: pl.Series) -> float:
    """nan of none."""
    found = values.cast(pl.Float64).mean()
    return float(found) if isinstance(found, float) else float("nan")


def pc_roles(runs: Runs) -> Figure:
    some = _components(runs).group_by("component").agg(pl.col("r_q", "r_k").mean()).sort("component")
    figure, axes = canvas("how principal components go with position (mean over heads)", 7.0)
    bars = {"r of q": (some["r_q"].to_list(), BLUE), "r of k": (some["r_k"].to_list(), ORANGE)}
    beside(axes, [str(one - 1) for one in some["component"]], bars)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="component", ylabel="mean of r with position")
    return figure


def explained_variance(runs: Runs) -> Figure:
    some = _components(runs).group_by("component").agg(pl.col("explained").mean()).sort("component")
    figure, axes = canvas("variance that principal components explain (mean over heads)", 7.0)
    bars = axes.bar([str(one - 1) for one in some["component"]], some["explained"], color="#7b5ea7")
    axes.bar_label(bars, [f"{one:.1%}" for one in some["explained"]], fontsize=8)
    axes.set(xlabel="component", ylabel="share of variance")
    axes.grid(alpha=0.3, axis="y")
    return figure


def _components(runs: Runs) -> pl.DataFrame:
    return pl.concat([run.geometry["components"] for run in runs]).filter(pl.col("component") <= PUBLISHED)


def rq_rk_scatter(runs: Runs) -> Figure:
    figure, axes = canvas("position on the leading component, a point per head", 6.0, 5.2)
    colours = colormaps["tab10"]
    for number, (family, mine) in enumerate(families(runs).items()):
        heads = heads_of(mine)
        axes.scatter(heads["pc1_r_q"], heads["pc1_r_k"], s=9, alpha=0.6, color=colours(number % 10), label=family)
    thresholds(axes)
    axes.set(xlabel="r of q", ylabel="r of k")
    axes.legend(fontsize=8)
    return figure


def thresholds(axes: Axes) -> None:
    """Where the taxonomies part."""
    for at in (LOW, HIGH):
        axes.axvline(at, color="grey", linestyle="--", linewidth=0.7)
        for sign in (-1, 1):
            axes.axhline(sign * at, color="grey", linestyle="--", linewidth=0.7)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlim=(-0.05, 1.05), ylim=(-1.05, 1.05))


def heatmap_rq(runs: Runs) -> Figure:
    return _one_map(runs, "pc1_r_q", "r of q with position on the leading component, by depth", "Blues")


def heatmap_rk(runs: Runs) -> Figure:
    return _one_map(runs, "pc1_r_k", "r of k with position on the leading component, by depth", "Reds")


def _one_map(runs: Runs, name: str, title: str, colours: str) -> Figure:
    figure, axes = canvas(title, 8.5, 1.8 + 0.4 * len(runs))
    by_depth(axes, runs, pl.col(name), colours, (0.0, 1.0), "{:.2f}")
    return figure


def by_depth(
    axes: Axes, runs: Runs, value: pl.Expr, colours: str, limits: tuple[float, float] | None, form: str
) -> None:
    """A row per run, ten stretches from its first layer to its last; the mean over heads is written in each."""
    matrix = np.full((len(runs), DEPTHS), np.nan)
    for row, run in enumerate(runs):
        stretch = (pl.col("layer") * DEPTHS / max(1, run.deepest)).floor().clip(0, DEPTHS - 1).cast(pl.Int32)
        means = run.geometry["heads"].group_by(stretch.alias("at")).agg(value.cast(pl.Float64).mean().alias("mean"))
        for at, mean in means.iter_rows():
            matrix[row, at] = np.nan if mean is None else mean
    low, high = limits or (float(np.nanmin(matrix)), float(np.nanmax(matrix)))
    image = axes.imshow(matrix, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    for (row, at), found in np.ndenumerate(matrix):
        if np.isfinite(found):
            dark = (found - low) > 0.6 * (high - low)
            axes.text(
                at, row, form.format(found), ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    axes.set_yticks(range(len(runs)), [run.label for run in runs])
    axes.set_xticks(range(DEPTHS), [f"{at / DEPTHS:.1f}" for at in range(DEPTHS)])
    axes.set_xlabel("depth: 0 is the first layer, 1 the last")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes)


def drift_bars(runs: Runs) -> Figure:
    figure, axes = canvas("position on the drift axis (mean of |r| over heads)", 2.5 + 0.9 * max(3, len(runs)))
    values = {
        f"|r| of {kind}": ([mean_of(run, f"r_{kind}", absolute=True) for run in runs], colour)
        for kind, colour in (("q", BLUE), ("k", ORANGE))
    }
    beside(axes, [run.label for run in runs], values)
    axes.set(ylabel="mean of |r| with position", ylim=(0, 1))
    return figure


def variance_decomposition(runs: Runs) -> Figure:
    figure, axes = canvas("variance of queries and keys together (mean over heads)", 2.5 + 0.9 * max(3, len(runs)))
    base = np.zeros(len(runs))
    parts = {
        "variance_a": ("a: drift", ORANGE),
        "variance_b": ("b: queries against keys", BLUE),
        "variance_rest": ("the rest", "#cccccc"),
    }
    for name, (label, colour) in parts.items():
        share = np.array([mean_of(run, name) for run in runs])
        axes.bar(range(len(runs)), share, bottom=base, color=colour, label=label)
        base += share
    name_bars(axes, [run.label for run in runs])
    axes.set(ylabel="share of variance", ylim=(0, 1))
    below(axes)
    return figure


def bias_strength(runs: Runs) -> Figure:
    found = families(runs)
    figure, axes = panels(len(found), "bias strength of heads, times 1000: above 0 favours later keys")
    for one, (family, mine) in zip(axes, found.items(), strict=True):
        values = heads_of(mine)["bias_strength"].to_numpy() * 1000
        one.hist(values, bins=40, color=BLUE)
        one.axvline(0, color="red", linestyle="--", linewidth=1)
        one.set_title(f"{family}: {(values > 0).mean():.1%} of {len(values)} above 0", fontsize=9)
        one.set(xlabel="bias strength x 1000", ylabel="heads")
    return figure


def slope_ratio(runs: Runs) -> Figure:
    figure, axes = canvas("how much faster keys drift than queries (median over heads)", 2.5 + 0.9 * max(3, len(runs)))
    medians = []
    for run in runs:
        heads = run.geometry["heads"].filter(pl.col("alpha_q") != 0)
        medians.append(float(np.median((heads["alpha_k"].abs() / heads["alpha_q"].abs()).to_numpy())))
    beside(axes, [run.label for run in runs], {"ratio": (medians, BLUE)})
    axes.axhline(1, color="black", linestyle="--", linewidth=0.8)
    axes.set(ylabel="|alpha of k| / |alpha of q|")
    return figure


def layer_heatmaps(runs: Runs) -> Figure:
    figure = Figure(figsize=(8.5, 2.6 + 0.8 * len(runs)), layout="constrained")
    above, below = figure.subplots(2, 1)
    above.set_title("|r| of k with position on the drift axis", fontsize=10)
    by_depth(above, runs, pl.col("r_k").abs(), "Reds", (0.0, 1.0), "{:.2f}")
    below.set_title("bias strength, times 1000", fontsize=10)
    by_depth(below, runs, pl.col("bias_strength") * 1000, "Purples", None, "{:.2f}")
    return figure


def bias_vs_separation(runs: Runs) -> Figure:
    found = families(runs)
    every = heads_of(runs)
    figure, axes = panels(len(found), f"bias against separation of queries and keys: r = {_r(every):+.2f} of all heads")
    for one, (family, mine) in zip(axes, found.items(), strict=True):
        heads = heads_of(mine)
        one.scatter(heads["separation_strength_notes"], heads["bias_strength"] * 1000, s=8, alpha=0.6, color=BLUE)
        one.set_title(f"{family}: r = {_r(heads):+.2f}", fontsize=9)
        one.set(xlabel="separation strength", ylabel="bias strength x 1000")
        one.grid(alpha=0.3)
    return figure


def _r(heads: pl.DataFrame) -> float:
    return float(np.corrcoef(heads["separation_strength_notes"], heads["bias_strength"])[0, 1])
