"""Figures in one style: a map of layers by heads, points, lines. matplotlib's objects, without its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE = "#0072b2", "#d55e00"
"""Queries and keys, everywhere; told apart without colour vision too (Okabe and Ito)."""


def canvas(title: str, width: float = 6.0, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    return figure, axes


def grid(table: pl.DataFrame, value: str, column: str = "head") -> tuple[np.ndarray, list[int], list[int]]:
    """A tidy table as a matrix of layers by `column`; nan where there is no row."""
    layers, others = (table[name].unique().sort() for name in ("layer", column))
    matrix = np.full((len(layers), len(others)), np.nan)
    rows, columns = layers.search_sorted(table["layer"]), others.search_sorted(table[column])
    matrix[rows.to_numpy(), columns.to_numpy()] = table[value].to_numpy()
    return matrix, layers.to_list(), others.to_list()


def head_map(table: pl.DataFrame, value: str, title: str, signed: bool = False, column: str = "head") -> Figure:
    """Colour by layer and head; `signed` values get a scale with zero in the middle."""
    matrix, layers, others = grid(table, value, column)
    figure, axes = canvas(title, 2.5 + 0.35 * min(len(others), 24), 1.5 + 0.16 * max(len(layers), 8))
    limit = float(np.nanmax(np.abs(matrix))) if np.isfinite(matrix).any() else 1.0
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "viridis"}
    image = axes.imshow(matrix, aspect="auto", origin="lower", interpolation="nearest", **scale)
    label_ticks(axes, layers, others)
    axes.set(xlabel=column.replace("_", " "), ylabel="layer")
    figure.colorbar(image, ax=axes)
    return figure


def label_ticks(axes: Axes, layers: Sequence[int], others: Sequence[int]) -> None:
    """Of a map: layers upwards and others across, some of them where there are many."""
    for ticks, labels in ((axes.set_yticks, layers), (axes.set_xticks, others)):
        step = max(1, len(labels) // 15)
        ticks(range(0, len(labels), step), [str(label) for label in labels[::step]])


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """One line with dots per named curve; each is thinner than those it may lie over, so that all are seen."""
    figure, axes = canvas(title)
    for number, (name, (x, y)) in enumerate(curves.items()):
        thinner = number / max(1, len(curves) - 1)
        axes.plot(
            x, y, "o--" if number % 2 else "o-", linewidth=4 - 3 * thinner, markersize=7 - 4 * thinner, label=name
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if log_x:
        axes.set_xscale("log", base=2)
    # A logarithmic axis has no place for nothing but zeros.
    if log_y and any(value > 0 for _, y in curves.values() for value in y):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=8)
    return figure


def by_layer(table: pl.DataFrame, values: Mapping[str, str], title: str, ylabel: str, spread: bool = True) -> Figure:
    """Median over heads against layer for each named column, with the range of its heads."""
    figure, axes = canvas(title)
    for label, value in values.items():
        found = table.group_by("layer").agg(
            pl.col(value).median().alias("middle"), pl.col(value).min().alias("low"), pl.col(value).max().alias("high")
        )
        found = found.sort("layer")
        axes.plot(found["layer"], found["middle"], marker="o", markersize=3, label=label)
        if spread:
            axes.fill_between(found["layer"], found["low"], found["high"], alpha=0.2)
    axes.set(xlabel="layer", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def scatter_by_layer(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], layer: np.ndarray, title: str, xlabel: str, ylabel: str
) -> Figure:
    """One point per head, coloured by layer."""
    figure, axes = canvas(title)
    points = axes.scatter(x, y, c=layer, s=14, cmap="viridis")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    figure.colorbar(points, ax=axes, label="layer")
    return figure
