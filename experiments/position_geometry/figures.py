"""The figures of position_geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..common.figures import BLUE, ORANGE, canvas, head_map, scatter_by_layer


def figures(tables: Mapping[str, pl.DataFrame]) -> dict[str, Figure]:
    heads, points, turned = tables["heads"], tables["plane_points"], tables["rotary_planes"].filter(kind="q")
    shown = heads.row(int(heads["bias_strength"].abs().arg_max() or 0), named=True)
    layer = heads["layer"].to_numpy()
    drawn = {
        "bias_strength": head_map(heads, "bias_strength", "bias strength: > 0 favours later keys", signed=True),
        "linear_share": head_map(heads, "linear_share", "share of variance linear in position"),
        "correlations": scatter_by_layer(
            heads["r_q"].to_numpy(), heads["r_k"].to_numpy(), layer, "position on the drift axis", "r of q", "r of k"
        ),
        "leading_component": scatter_by_layer(
            heads["pc1_r_q"].to_numpy(),
            heads["pc1_r_k"].to_numpy(),
            layer,
            "position on the leading component",
            "r of q",
            "r of k",
        ),
        "drift_plane": _drift_plane(points.filter(layer=shown["layer"], head=shown["head"]), shown),
    }
    if len(turned):
        weights = turned.group_by("layer", "pair").agg(pl.col("weight").mean())
        title = "weight of rotary pairs in what queries tell of position (mean of heads)"
        drawn["rotary_planes"] = head_map(weights, "weight", title, column="pair")
    return drawn


def _drift_plane(points: pl.DataFrame, shown: dict[str, Any]) -> Figure:
    figure, axes = canvas(f"drift plane of layer {shown['layer']}, head {shown['head']}; later positions are darker")
    for kind, colour in (("q", BLUE), ("k", ORANGE)):
        side = points.filter(kind=kind)
        # Early positions are pale: the colour's fourth number is how opaque a point is.
        late = side["position"].to_numpy() / max(1, int(points["position"].to_numpy().max()))
        shades = np.column_stack([np.tile(to_rgb(colour), (len(side), 1)), 0.25 + 0.75 * late])
        axes.scatter(side["a"], side["b"], s=14, c=shades, linewidths=0)
        axes.scatter([], [], color=colour, label=kind)
    axes.set(xlabel="a: drift with position", ylabel="b: queries against keys")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
