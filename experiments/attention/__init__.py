"""What queries do with all their keys: sinks, entropy, distances, kinds of heads; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.reader.texts import tokens_of

from ..common.entry import progress
from ..common.figures import by_layer, canvas, grid, head_map, label_ticks
from ..common.results import Result, head_columns, middle
from ..common.rows import WEIGHTS, chosen_layers, of_sections
from .core import TYPES, Attending, induction, mean_distance, near, previous, relative_entropy, types_of

NEEDED = ("entropy", "max_logit", "first", "self", "sink", "distance", "out_norm")
COLOURS = ("#d55e00", "#0072b2", "#cc79a7", "#009e73", "#bbbbbb")
"""Of TYPES; told apart without colour vision too (Okabe and Ito)."""


@dataclass(frozen=True)
class Attention:
    """Exact statistics of attention by head, from a run with `capture.attention`.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only queries in these; None for all. Keys are all there are.
        threshold: the mean weight, or share of queries, from which on a head is called by a name.
        local: a local head's weight lies on keys less than so many positions away; one less than a power of two.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    threshold: float = 0.5
    local: int = 15

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"attention.threshold={self.threshold} must lie between 0 and 1")
        if self.local < 1 or self.local & (self.local + 1):
            raise ConfigError(f"attention.local={self.local} must be one less than a power of two, such as 15")
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights={self.weights} must be one of {', '.join(WEIGHTS)}")

    def measure(self, run: Run) -> Result:
        """Tables: heads, and distances (mean weight of each head by floor(log2(1 + distance))).

        Raises:
            RunError: the run has no statistics of attention, or not all that are needed.
        """
        run = of_sections(run, self.sections)
        if missing := [name for name in NEEDED if name not in run.statistics]:
            raise RunError(f"{run.folder} has no {', '.join(missing)} of attention: capture with capture.attention=all")
        layers = chosen_layers(run, self.layers)
        tokens = _tokens(run)
        found = [self._layer(run, layer, tokens) for layer in progress(layers, "attention")]
        heads, distances = (pl.concat(tables) for tables in zip(*found, strict=True))
        tables = {"heads": heads, "distances": distances}
        return Result(tables, _findings(heads, self, bool(tokens)), partial(_figures, heads, distances))

    def _layer(self, run: Run, layer: int, tokens: dict[int, np.ndarray]) -> tuple[pl.DataFrame, pl.DataFrame]:
        found = load(run, layer, self.weights)
        candidates, able = induction(found, tokens) if tokens else (np.full(len(found.heads), np.nan), 0)
        numbers = {
            "entropy": found.mean(found.entropy),
            "relative_entropy": relative_entropy(found),
            "first": found.mean(found.first),
            "itself": found.mean(found.itself),
            "sink": found.mean(found.sink),
            "near": near(found, self.local),
            "distance": mean_distance(found),
            "previous": previous(found),
            "induction": candidates,
            "out_norm": found.mean(found.out_norm),
        }
        rows = [len(found.positions)] * len(found.heads)
        heads = head_columns(layer, found.heads, **numbers, rows=rows, repeated=[able] * len(rows)).with_columns(
            pl.col("induction").fill_nan(None), type=pl.Series(types_of(numbers, self.threshold), dtype=pl.String)
        )
        profile = np.stack([found.mean(found.distance[:, :, number]) for number in range(found.distance.shape[2])], 1)
        distances = pl.DataFrame(
            {
                "layer": [layer] * profile.size,
                "head": np.repeat(found.heads, profile.shape[1]),
                "number": np.tile(np.arange(profile.shape[1]), len(profile)),
                "nearest": np.tile(2 ** np.arange(profile.shape[1]) - 1, len(profile)),
                "weight": profile.reshape(-1),
            }
        ).with_columns(pl.col("layer", "head", "number").cast(pl.Int16))
        return heads, distances


def load(run: Run, layer: int, weights: str) -> Attending:
    """The statistics of one layer's heads as arrays.

    Raises:
        RunError: not captured, or no rows.
    """
    heads = run.heads(layer, "attention")
    table = run.scan([layer], kind="attention", inclusion_probability=True)
    rows = table.sort("head", "bucket", "example_id", "position").collect()
    n = len(rows) // len(heads)
    if n == 0:
        raise RunError(f"layer {layer} of {run.folder} has no queries: capture more with sampler.base_rate or examples")

    def by_head(name: str) -> np.ndarray:
        values = rows[name].to_numpy()
        return values.astype(np.float64).reshape(len(heads), n, *values.shape[1:])

    first = rows.head(n)
    probability = first["inclusion_probability"].to_numpy()
    return Attending(
        heads=heads,
        entropy=by_head("entropy"),
        first=by_head("first"),
        itself=by_head("self"),
        sink=by_head("sink"),
        distance=by_head("distance"),
        key=by_head("max_position").astype(np.int64),
        out_norm=by_head("out_norm"),
        positions=first["position"].to_numpy(),
        example_ids=first["example_id"].to_numpy(),
        weights=1 / probability if weights == "positions" else np.ones(n),
    )


def _tokens(run: Run) -> dict[int, np.ndarray]:
    """The token ids of all documents; none where the run kept none."""
    try:
        table = tokens_of(run.folder, run.manifest)
    except RunError:
        return {}
    pieces = np.split(table.token_ids, table.starts[1:-1])
    return dict(zip(table.example_ids.tolist(), pieces, strict=True))


def _findings(heads: pl.DataFrame, asked: Attention, has_tokens: bool) -> list[str]:
    total = len(heads)
    sinks = heads.with_columns(together=pl.col("first") + pl.col("sink"))
    most = sinks.sort("together").row(-1, named=True)
    by = heads.group_by("layer").agg(pl.col("relative_entropy").median()).sort("relative_entropy")
    low, high = by.row(0, named=True), by.row(-1, named=True)
    said = [
        f"The first position and learned sinks take {middle(sinks['together']):.0%} of a query's weight (median of "
        f"{total} heads), most in layer {most['layer']}, head {most['head']}: {most['together']:.0%}.",
        f"Entropy is {middle(heads['relative_entropy']):.0%} of what equal weights have (median of heads), from "
        f"{low['relative_entropy']:.0%} in layer {low['layer']} to {high['relative_entropy']:.0%} in layer "
        f"{high['layer']}.",
    ]
    counts = dict(heads.group_by("type").len().iter_rows())
    named = ", ".join(f"{counts.get(name, 0)} {name}" for name in TYPES)
    said.append(f"Of {total} heads, by a threshold of {asked.threshold:g}: {named}.")
    before = heads.sort("previous").row(-1, named=True)
    said.append(
        f"Most like a previous-token head: layer {before['layer']}, head {before['head']}, whose largest weight is on "
        f"the token before in {before['previous']:.0%} of queries."
    )
    able = heads.drop_nulls("induction")
    if not has_tokens:
        said.append("Induction needs token ids: capture with output.tokens=true.")
    elif len(able):
        best = able.sort("induction").row(-1, named=True)
        said.append(
            f"Most like an induction head: layer {best['layer']}, head {best['head']}, whose largest weight is on what "
            f"followed the same token before in {best['induction']:.0%} of {best['repeated']} queries that repeat one."
        )
    return said


def _figures(heads: pl.DataFrame, distances: pl.DataFrame) -> dict[str, Figure]:
    middle_weight = distances.group_by("layer", "number").agg(pl.col("weight").mean()).sort("layer", "number")
    return {
        "entropy_map": head_map(heads, "relative_entropy", "entropy over that of equal weights"),
        "first_map": head_map(heads, "first", "weight of position 0"),
        "types": _type_map(heads),
        "distances": head_map(
            middle_weight, "weight", "weight by floor(log2(1 + distance)), mean of heads", column="number"
        ),
        "by_layer": by_layer(
            heads, {"first": "first", "itself": "itself", "sinks": "sink"}, "weights by layer", "mean weight"
        ),
    }


def _type_map(heads: pl.DataFrame) -> Figure:
    numbers = heads.with_columns(number=pl.col("type").replace_strict({name: n for n, name in enumerate(TYPES)}))
    matrix, layers, others = grid(numbers, "number")
    figure, axes = canvas("kinds of heads", 3.5 + 0.35 * min(len(others), 24), 1.5 + 0.16 * max(len(layers), 8))
    axes.imshow(
        matrix,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=ListedColormap(COLOURS),
        vmin=-0.5,
        vmax=4.5,
    )
    label_ticks(axes, layers, others)
    axes.set(xlabel="head", ylabel="layer")
    there = set(heads["type"])
    shown = [Patch(color=colour, label=name) for name, colour in zip(TYPES, COLOURS, strict=True) if name in there]
    axes.legend(handles=shown, bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=8, frameon=False)
    return figure
