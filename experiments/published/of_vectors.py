"""Collages: the vectors of some heads themselves, on two components, on the drift plane, and off that plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ..common.moments import Moments, moments_of
from ..common.rows import LayerVectors, load_queries_and_keys
from ..position_geometry.pca import components
from ..position_geometry.plane import basis, plane
from ..position_geometry.rings import rings
from .of_models import Runs, panels
from .studied import Studied

HEADS, PAIRS = 4, 30
SHADES = {
    "q": LinearSegmentedColormap.from_list("queries", ["#b9dcf2", "#0072b2", "#00273d"]),
    "k": LinearSegmentedColormap.from_list("keys", ["#f9d3b4", "#d55e00", "#4a1f00"]),
}
"""Early positions are pale, late ones dark."""


@dataclass(frozen=True)
class Head:
    """One head's vectors; arrays have a head axis of length 1."""

    layer: int
    head: int
    queries: LayerVectors
    keys: LayerVectors

    @property
    def moments(self) -> tuple[Moments, Moments]:
        return moments_of(self.queries), moments_of(self.keys)


def some_heads(run: Studied, count: int, seed: int) -> Iterator[Head]:
    """Heads drawn at random; a layer is read once."""
    every = [(layer, head) for layer in run.layers for head in run.run.heads(layer, "q")]
    rng = np.random.default_rng(seed)
    drawn = sorted(every[place] for place in rng.choice(len(every), size=min(count, len(every)), replace=False))
    read: tuple[int, LayerVectors, LayerVectors] | None = None
    for layer, head in drawn:
        if read is None or read[0] != layer:
            read = (layer, *load_queries_and_keys(run.run, layer, run.weights))
        at = [read[1].heads.index(head)]
        yield Head(layer, head, read[1].of_heads(at), read[2].of_heads(at))


def points(axes: Axes, head: Head, span: Float64[np.ndarray, "dim 2"], size: float = 5) -> None:
    """Queries and keys along two axes."""
    latest = max(1, int(head.queries.positions.max()), int(head.keys.positions.max()))
    for rows in (head.keys, head.queries):
        at = rows.vectors[0].astype(np.float64) @ span
        axes.scatter(
            at[:, 0],
            at[:, 1],
            c=rows.positions,
            cmap=SHADES[rows.kind],
            vmin=0,
            vmax=latest,
            s=size,
            linewidths=0,
            alpha=0.7,
            rasterized=True,
        )


def component_collage(runs: Runs, seed: int) -> Figure:
    """Of the first run."""

    def draw(one: Axes, head: Head) -> None:
        parts = components(*head.moments)
        points(one, head, parts.axes[0, :, :2])
        told = "\n".join(
            f"{place}: {share:.0%}, r of q {r_q:+.2f}, of k {r_k:+.2f}"
            for place, (share, r_q, r_k) in enumerate(
                zip(parts.explained[0, :2], parts.r_q[0], parts.r_k[0], strict=False)
            )
        )
        one.text(
            0.02,
            0.98,
            told,
            transform=one.transAxes,
            va="top",
            fontsize=6.5,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0},
        )
        one.set_title(f"layer {head.layer}, head {head.head}", fontsize=9)
        one.set(xlabel="component 0", ylabel="component 1")

    return _collage(runs, seed, "on their first two components", draw)


def plane_collage(runs: Runs, seed: int) -> Figure:
    """Of the first run."""

    def draw(one: Axes, head: Head) -> None:
        model = plane(*head.moments)
        span = np.stack([model.a[0], model.b[0]], axis=1)
        points(one, head, span)
        told = f"r of q {model.r_q[0]:+.2f}, of k {model.r_k[0]:+.2f}"
        one.set_title(f"layer {head.layer}, head {head.head}: {told}", fontsize=9)
        one.set(xlabel="a: drift with position", ylabel="b: queries against keys")

    return _collage(runs, seed, "on the drift plane; late is dark", draw)


def _collage(runs: Runs, seed: int, where: str, draw: Callable[[Axes, Head], None]) -> Figure:
    """Some heads of the first run, each drawn into axes of its own."""
    run = runs[0]
    drawn = list(some_heads(run, HEADS, seed))
    figure, axes = panels(len(drawn), f"{run.label}: queries (blue) and keys (orange) {where}", 2, 4.0, 3.4)
    for one, head in zip(axes, drawn, strict=True):
        draw(one, head)
    return figure


def complement_collage(runs: Runs, seed: int) -> Figure:
    """Of one head of the first run: its components off the drift plane in pairs, largest first."""
    run = runs[0]
    (head,) = some_heads(run, 1, seed)
    model = plane(*head.moments)
    rows = (head.queries, head.keys)
    vectors = np.concatenate([one.vectors for one in rows], axis=1)
    positions, weights = (np.concatenate([getattr(one, name) for one in rows]) for name in ("positions", "weights"))
    found = rings(basis(model.a, model.b)[:, :, 2:], vectors, positions, weights)
    count = min(PAIRS, found.speed.shape[1])
    title = f"{run.label}, layer {head.layer}, head {head.head}: off the drift plane, in pairs of components"
    figure, axes = panels(count, title, 6, 1.7, 1.75)
    for pair, one in enumerate(axes):
        span = found.axes[0][:, 2 * pair : 2 * pair + 2]
        points(one, head, span, 2)
        one.set_title(f"{2 * pair}, {2 * pair + 1}: turn {found.explained[0, pair]:.0%}", fontsize=7)
        one.set_xticks([])
        one.set_yticks([])
        one.set_aspect("equal", adjustable="datalim")
    return figure
