"""Where position sits in the space of a head, and which way it biases attention; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.types import Rope

from ..common.entry import progress
from ..common.moments import Moments, moments_of
from ..common.resampling import Draws, draw_documents, percentiles, unit_sums
from ..common.results import Result, head_columns
from ..common.rows import LayerVectors, chosen_layers, key_places, load, of_sections
from .figures import figures
from .heads import Numbers, numbers
from .line import kurtosis_again, line
from .pca import components, leading, taxonomies
from .plane import basis, largest_separation, plane
from .rings import Rings, drawn_again, rings
from .summary import sentences, summary
from .tables import component_table, dimension_table, interval_table, line_table, plane_points, rotary_table

SPAN = 16
"""Components that a draw's leading ones are looked for among."""


@dataclass(frozen=True)
class PositionGeometry:
    """Principal components and the planar rotation model of every head.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only rows of these; None for all.
        points: vectors per head and side that the table of the drift plane keeps, for pictures.
        seed: draws those, and documents.
        ring: the share of a pair of components that a turn at even speed must explain to count as a RoPE plane.
        resamples: draws of documents that intervals rest on; 0 for none.
        level: the share of draws that an interval holds.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    points: int = 100
    seed: int = 0
    ring: float = 0.25
    resamples: int = 200
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ConfigError(f"position_geometry.points={self.points} must be 1 or more")
        if not 0 < self.ring <= 1:
            raise ConfigError(f"position_geometry.ring={self.ring} must be above 0, and 1 at most")
        if self.resamples < 0 or not 0 < self.level < 1:
            raise ConfigError(
                f"position_geometry wants resamples 0 or more and level within 0 and 1, not {self.resamples} and "
                f"{self.level}"
            )

    def measure(self, run: Run) -> Result:
        """Tables: heads (a row per head), components, dimensions, rotary_planes, linear_model (per head and kind),
        intervals (per head and statistic), summary (of the run), plane_points (for pictures)."""
        run = of_sections(run, self.sections)
        layers = chosen_layers(run, self.layers, "q", "k")
        draws = draw_documents(run, self.resamples, self.seed)
        found = [self._layer(run, layer, draws) for layer in progress(layers, "position geometry")]
        tables = {name: pl.concat([one.tables[name] for one in found]) for name in found[0].tables}
        whole = {name: np.concatenate([one.values[name] for one in found]) for name in found[0].values}
        again = None
        if draws is not None:
            again = {name: np.concatenate([one.again[name] for one in found], axis=1) for name in whole}
        said = summary(whole, again, self.level)
        tables["summary"] = said.table()
        documents = None if draws is None else draws.documents
        findings = sentences(tables["heads"], said, documents, self.resamples, self.level)
        return Result(tables, findings, partial(figures, tables))

    def quick(self, run: Run) -> pl.DataFrame:
        """The columns of `heads` that follow from moments: neither turns nor tests, and no intervals."""
        run = of_sections(run, self.sections)
        found = []
        for layer in chosen_layers(run, self.layers, "q", "k"):
            queries, own_keys = load(run, layer, "q", self.weights), load(run, layer, "k", self.weights)
            q, k = moments_of(queries), moments_of(own_keys).of_heads(key_places(run, queries, own_keys))
            values = numbers(q, k, components(q, k), plane(q, k), run.manifest.layer(layer).scaling)
            named = taxonomies(values["pc1_r_q"], values["pc1_r_k"])
            found.append(head_columns(layer, queries.heads, **named, **values))
        return pl.concat(found)

    def _layer(self, run: Run, layer: int, draws: Draws | None) -> Layer:
        queries, own_keys = load(run, layer, "q", self.weights), load(run, layer, "k", self.weights)
        places = key_places(run, queries, own_keys)
        keys = own_keys.of_heads(places)
        q, own = moments_of(queries), moments_of(own_keys)
        k = own.of_heads(places)
        parts, model = components(q, k), plane(q, k)
        turns = rings(basis(model.a, model.b)[:, :, 2:], *_pooled(queries, keys))
        lines = {"q": line(queries, q), "k": line(own_keys, own)}
        scaling, rope = run.manifest.layer(layer).scaling, rope_of(run, layer)
        of_lines = {
            "kurtosis_q": lines["q"].shape.kurtosis[:, 0],
            "kurtosis_k": lines["k"].shape.kurtosis[places, 0],
        }
        found = {**numbers(q, k, parts, model, scaling), **self._of_turns(turns.share, turns.explained), **of_lines}
        again: Numbers = {}
        if draws is not None:
            sums = [unit_sums(rows, draws.of(rows), draws.units, of) for rows, of in ((queries, q), (own_keys, own))]
            start = parts.axes[:, :, :SPAN]
            drawn = [
                _numbers_again(one, other.of_heads(places), start, scaling)
                for one, other in zip(*(side.of_draws(draws.counts) for side in sums), strict=True)
            ]
            again = {name: np.stack([one[name] for one in drawn]) for name in drawn[0]}
            again |= self._turns_again(turns, queries, keys, draws)
            again |= {
                f"kurtosis_{kind}": kurtosis_again(lines[kind].along, rows.weights, draws.of(rows), draws.counts)[:, at]
                for kind, rows, at in (("q", queries, slice(None)), ("k", own_keys, places))
            }
        heads = head_columns(
            layer,
            queries.heads,
            key_head=list(keys.heads),
            **taxonomies(found["pc1_r_q"], found["pc1_r_k"]),
            **{name: values for name, values in found.items() if name not in of_lines},
            separation_strength_notes=largest_separation(q, k, model.a),
            residual_r=model.residual_r,
            rope=pl.Series([None if rope is None else bool(rope.inv_freq)] * len(queries.heads), dtype=pl.Boolean),
            rows_q=[len(queries)] * len(queries.heads),
            rows_k=[len(keys)] * len(keys.heads),
        )
        kinds = ((queries, lines["q"]), (own_keys, lines["k"]))
        tables = {
            "heads": heads,
            "components": component_table(layer, queries.heads, parts),
            "dimensions": pl.concat([dimension_table(rows, fitted, rope) for rows, fitted in kinds]),
            "rotary_planes": pl.concat([rotary_table(rows, fitted, rope) for rows, fitted in kinds]),
            "linear_model": pl.concat([line_table(rows, fitted) for rows, fitted in kinds]),
            "intervals": interval_table(layer, queries.heads, found, self._bounds(found, again)),
            "plane_points": plane_points(layer, queries, keys, model, self.points, self.seed),
        }
        return Layer(tables, found, again)

    def _bounds(self, found: Numbers, again: Numbers) -> Numbers:
        return {
            name: np.stack(percentiles(again[name], self.level)) if again else np.full((2, len(values)), np.nan)
            for name, values in found.items()
        }

    def _of_turns(self, share: np.ndarray, explained: np.ndarray) -> Numbers:
        return {
            "rope_planes": (explained >= self.ring).sum(-1),
            "rope_share": (share * explained).sum(-1),
        }

    def _turns_again(self, turns: Rings, queries: LayerVectors, keys: LayerVectors, draws: Draws) -> Numbers:
        unit = np.concatenate([draws.of(queries), draws.of(keys)])
        return self._of_turns(*drawn_again(turns, *_pooled(queries, keys), unit, draws.counts))


@dataclass(frozen=True)
class Layer:
    """Of one layer: tables, each head's numbers, and these in each draw of documents."""

    tables: dict[str, pl.DataFrame]
    values: Numbers
    again: Numbers


def rope_of(run: Run, layer: int) -> Rope | None:
    """How a layer turns q and k; None where that is not known."""
    try:
        return run.rope(layer)
    except RunError:
        return None


def _numbers_again(queries: Moments, keys: Moments, start: np.ndarray, scaling: float | None) -> Numbers:
    return numbers(queries, keys, leading(queries, keys, start), plane(queries, keys), scaling)


def _pooled(queries: LayerVectors, keys: LayerVectors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, positions and weights of both."""
    return (
        np.concatenate([queries.vectors, keys.vectors], axis=1),
        np.concatenate([queries.positions, keys.positions]),
        np.concatenate([queries.weights, keys.weights]),
    )
