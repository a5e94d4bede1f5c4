"""Where position sits in the space of a head, and which way it biases attention; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sniffer.errors import ConfigError
from sniffer.reader.run import Run

from ..common.entry import progress
from ..common.figures import BLUE, ORANGE, canvas, head_map, scatter_by_layer
from ..common.moments import moments_of, pool
from ..common.results import Result, head_columns, middle
from ..common.rows import LayerVectors, chosen_layers, load_queries_and_keys, of_sections
from .pca import TAXONOMY, Components, components, linear_share, taxonomy
from .plane import Plane, basis, plane
from .rings import rings


@dataclass(frozen=True)
class PositionGeometry:
    """Principal components and the planar rotation model of every head.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only rows of these; None for all.
        points: vectors per head and side that the table of the drift plane keeps, for pictures.
        seed: draws those.
        ring: the share of a pair of components that a turn at even speed must explain to count as a RoPE plane.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    points: int = 100
    seed: int = 0
    ring: float = 0.25

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ConfigError(f"position_geometry.points={self.points} must be 1 or more")
        if not 0 < self.ring <= 1:
            raise ConfigError(f"position_geometry.ring={self.ring} must be above 0, and 1 at most")

    def measure(self, run: Run) -> Result:
        """Tables: heads (one row per head), components (per head and component), plane_points (for pictures)."""
        run = of_sections(run, self.sections)
        layers = chosen_layers(run, self.layers, "q", "k")
        found = [self._layer(run, layer) for layer in progress(layers, "position geometry")]
        heads, parts, points = (pl.concat(tables) for tables in zip(*found, strict=True))
        tables = {"heads": heads, "components": parts, "plane_points": points}
        return Result(tables, _findings(heads), _figures(heads, points))

    def _layer(self, run: Run, layer: int) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
        queries, keys = load_queries_and_keys(run, layer, self.weights)
        q, k = moments_of(queries), moments_of(keys)
        parts, model = components(q, k), plane(q, k)
        pooled = pool(q, k)
        turns = rings(
            basis(model.a, model.b)[:, :, 2:],
            np.concatenate([queries.vectors, keys.vectors], axis=1),
            np.concatenate([queries.positions, keys.positions]),
            np.concatenate([queries.weights, keys.weights]),
        )
        scaling = run.manifest.layer(layer).scaling
        heads = head_columns(
            layer,
            queries.heads,
            key_head=list(keys.heads),
            taxonomy=taxonomy(parts.r_q[:, 0], parts.r_k[:, 0]),
            pc1_explained=parts.explained[:, 0],
            pc1_r_q=parts.r_q[:, 0],
            pc1_r_k=parts.r_k[:, 0],
            linear_share=linear_share(pooled),
            r_q=model.r_q,
            r_k=model.r_k,
            alpha_q=model.alpha_q,
            alpha_k=model.alpha_k,
            mu_q_a=model.mu_q_a,
            mu_k_a=model.mu_k_a,
            mu_q_b=model.mu_q_b,
            mu_k_b=model.mu_k_b,
            bias_strength=model.bias_strength,
            bias_logits_per_1000=model.bias_strength * 1000 * (np.nan if scaling is None else scaling),
            variance_a=model.variance_a,
            variance_b=model.variance_b,
            variance_rest=1 - model.variance_a - model.variance_b,
            rope_planes=(turns.explained >= self.ring).sum(1),
            rope_share=(turns.share * turns.explained).sum(1),
            residual_r=model.residual_r,
            rows_q=[len(queries)] * len(queries.heads),
            rows_k=[len(keys)] * len(keys.heads),
        )
        return heads, _component_table(layer, queries.heads, parts), self._points(layer, queries, keys, model)

    def _points(self, layer: int, queries: LayerVectors, keys: LayerVectors, model: Plane) -> pl.DataFrame:
        """Some vectors of each head, as seen on the plane."""
        frames = []
        for rows in (queries, keys):
            rng = np.random.default_rng([self.seed, layer])
            some = rows.take(np.sort(rng.choice(len(rows), size=min(self.points, len(rows)), replace=False)))
            heads, n = some.vectors.shape[:2]
            frame = {
                "layer": np.full(heads * n, layer, dtype=np.int16),
                "head": np.repeat(np.array(queries.heads, dtype=np.int16), n),
                "kind": [rows.kind] * (heads * n),
                "position": np.tile(some.positions, heads),
                "a": np.einsum("hnd,hd->hn", some.vectors, model.a).ravel().astype(np.float32),
                "b": np.einsum("hnd,hd->hn", some.vectors, model.b).ravel().astype(np.float32),
            }
            frames.append(pl.DataFrame(frame))
        return pl.concat(frames)


def _component_table(layer: int, heads: tuple[int, ...], parts: Components) -> pl.DataFrame:
    count, components_each = parts.explained.shape
    return pl.DataFrame(
        {
            "layer": np.full(count * components_each, layer, dtype=np.int16),
            "head": np.repeat(np.array(heads, dtype=np.int16), components_each),
            "component": np.tile(np.arange(1, components_each + 1, dtype=np.int16), count),
            "explained": parts.explained.ravel(),
            "r_q": parts.r_q.ravel(),
            "r_k": parts.r_k.ravel(),
        }
    )


def _findings(heads: pl.DataFrame) -> list[str]:
    bias = heads["bias_strength"]
    later = int((bias > 0).sum())
    shown = heads.row(int(bias.abs().arg_max() or 0), named=True)
    kinds = heads["taxonomy"].value_counts().rows()
    counts = dict(kinds)
    return [
        f"{later} of {len(heads)} heads ({later / len(heads):.0%}) have a positive bias strength: along the drift axis "
        "they favour later keys whatever these hold.",
        f"On the drift axis the median |r| with position is {middle(heads['r_q'].abs()):.2f} for queries and "
        f"{middle(heads['r_k'].abs()):.2f} for keys; the axis holds {middle(heads['variance_a']):.1%} of the variance, "
        f"and a straight line in position explains {middle(heads['linear_share']):.1%} of it (medians).",
        "By the leading component, heads are "
        + ", ".join(f"{name} {counts[name]}" for name in TAXONOMY if name in counts)
        + ".",
        f"The strongest bias is in layer {shown['layer']}, head {shown['head']}: {shown['bias_strength']:+.4f} "
        f"in q.k per position of the key"
        + (
            f", {shown['bias_logits_per_1000']:+.2f} in the logit per 1000 positions."
            if np.isfinite(shown["bias_logits_per_1000"])
            else "."
        ),
        f"Off the plane, turns at even speed, as RoPE makes them, explain {middle(heads['rope_share']):.0%} of the "
        f"variance; {middle(heads['rope_planes']):.0f} pairs of components are mostly such a turn (medians).",
    ]


def _figures(heads: pl.DataFrame, points: pl.DataFrame) -> dict[str, Figure]:
    shown = heads.row(int(heads["bias_strength"].abs().arg_max() or 0), named=True)
    layer = heads["layer"].to_numpy()
    return {
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
