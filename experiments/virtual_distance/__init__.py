"""What logits and preferences become when only the distance of query and key changes; see README.md here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Int

from sniffer.errors import ConfigError, RunError
from sniffer.reader.rotary import Rotary
from sniffer.reader.run import Run
from sniffer.types import LayerGeometry

from ..common.entry import progress
from ..common.results import Result, head_columns
from ..common.rows import LayerVectors, chosen_layers, key_places, load, of_sections
from .core import (
    Side,
    add_up,
    apart,
    at_distances,
    in_several,
    ranges_of,
    shares,
    sinks,
)
from .preferences import draw_triples, preferences
from .told import figures, findings

MOST_CELLS = 16
"""Stretches of positions that average contents are told apart by."""
BEYOND = 8
"""Times the longest text, up to which distances go."""
PARTS = ("observed", "rope", "drift", "content")


@dataclass(frozen=True)
class Layer:
    """One layer as it is measured; `first` and `sinks` count the keys that were left out."""

    run: Run
    geometry: LayerGeometry
    heads: tuple[int, ...]
    q: Side
    k: Side
    key_of: list[int]
    speeds: np.ndarray
    first: int
    sinks: int

    @property
    def where(self) -> str:
        return f"layer {self.geometry.layer} of {self.run.folder}"

    def several(self) -> tuple[Side, Side, int, bool]:
        """Both sides at positions that two documents reach, how many rows that leaves out, whether there are two."""
        if len(np.unique(np.concatenate([self.q.documents, self.k.documents]))) < 2:
            return self.q, self.k, 0, False
        met = [np.flatnonzero(in_several(side)) for side in (self.q, self.k)]
        if not len(met[0]) or not len(met[1]):
            raise RunError(f"{self.where} has no positions that two documents have rows about: capture more")
        left_out = len(self.q.positions) + len(self.k.positions) - len(met[0]) - len(met[1])
        return self.q.take(met[0]), self.k.take(met[1]), left_out, True


@dataclass(frozen=True)
class VirtualDistance:
    """Logits and preferences at distances that pairs do not have.

    Attributes:
        layers: as capture.layers; None for all that RoPE turns.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only rows of these; None for all.
        distances: to put pairs at; None for 1, 2, 4, ... up to eight times the longest text.
        near: distances up to this one are near; the farthest range of distances is far.
        drop_first: keys at so many first positions are left out.
        drop_sinks: keys that all queries favour are left out: so many deviations above the median key; None for none.
        count, seed: triples of a query and two keys drawn per layer, and the seed that draws them.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    distances: list[int] | None = None
    near: int = 32
    drop_first: int = 0
    drop_sinks: float | None = None
    count: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        distances = [1] if self.distances is None else self.distances
        if not distances or not all(isinstance(one, int) and one >= 0 for one in distances):
            raise ConfigError(f"virtual_distance.distances={self.distances} must be whole numbers, 0 or more")
        if (
            self.near < 1
            or self.count < 1
            or self.drop_first < 0
            or (self.drop_sinks is not None and self.drop_sinks <= 0)
        ):
            raise ConfigError(
                "virtual_distance wants near and count 1 or more, drop_first 0 or more, drop_sinks above 0"
            )

    def measure(self, run: Run) -> Result:
        """Tables: heads; curves (per head and range of distances); virtual, preferences (and distance put at)."""
        run = of_sections(run, self.sections)
        rotaries = {layer: run.rotary(layer) for layer in self._layers(run)}
        turning = [layer for layer, rotary in rotaries.items() if rotary.turns]
        if not turning:
            raise RunError(
                f"no layer of {run.folder} that was asked for turns by position: there is no distance to change"
            )
        longest = int(run.examples()["n_tokens"].max() or 1)  # type: ignore[arg-type]
        distances = self._distances(longest, [rotaries[layer] for layer in turning])
        found = [
            self._layer(run, rotaries[layer], longest, distances) for layer in progress(turning, "virtual distance")
        ]
        tables = {name: pl.concat([one[name] for one in found]) for name in found[0]}
        dropped = tables.pop("dropped")
        still = [layer for layer in rotaries if layer not in turning]
        return Result(tables, findings(tables, dropped, still, self.near), partial(figures, tables))

    def _layers(self, run: Run) -> list[int]:
        """Those with both sides, before RoPE or after it."""
        sides = [("q_pre", "k_pre"), ("q", "k")]
        kinds = next((side for side in sides if set(side) <= {*run.kinds}), sides[1])
        return chosen_layers(run, self.layers, *kinds)

    def _distances(self, longest: int, rotaries: Iterable[Rotary]) -> Int[np.ndarray, " distances"]:
        given = ranges_of(BEYOND * longest - 1)[:-1] if self.distances is None else np.array(self.distances)
        for rotary in rotaries:
            if rotary.rope.until is not None and self.distances is None:
                given = given[given < rotary.rope.until]
            rotary.turned(np.empty((len(given), 2 * len(rotary.rope.inv_freq) + rotary.rope.first)), given)
        return np.unique(given)

    def _layer(self, run: Run, rotary: Rotary, longest: int, distances: np.ndarray) -> dict[str, pl.DataFrame]:
        here = self._load(run, rotary)
        shown, alone, left_out = self._curves(here, ranges_of(longest - 1), distances)
        triples = draw_triples(here.q, here.k, self.count, here.geometry.first_key, [self.seed, rotary.layer])
        wins = preferences(here.q, here.k, here.key_of, here.speeds, triples, distances)
        curve = {"rope": alone, "together": wins.together, "further": wins.further}
        counts = {"sinks": here.sinks, "first": here.first, "triples": len(triples.one), "alone": left_out}
        told = {**shown["heads"], "content_wins": wins.changed}
        return {
            "heads": head_columns(rotary.layer, here.heads, **told),
            "curves": _long(rotary.layer, here.heads, *shown["curves"]),
            "virtual": _long(rotary.layer, here.heads, *shown["virtual"]),
            "preferences": _long(rotary.layer, here.heads, {"distance": distances}, curve),
            "dropped": pl.DataFrame({name: [count] for name, count in counts.items()}),
        }

    def _load(self, run: Run, rotary: Rotary) -> Layer:
        """Both sides of a layer before RoPE, without the keys that are to be left out."""
        geometry = run.manifest.layer(rotary.layer)
        if geometry.scaling is None:
            raise RunError(f"layer {rotary.layer} of {run.folder} has no scaling in its manifest: capture again")
        queries, keys = (self._before(run, rotary, side) for side in ("q", "k"))
        places = key_places(run, queries, keys)
        chosen = list(dict.fromkeys(places))
        first = keys.positions < self.drop_first
        q, k = (_side(rows, rotary) for rows in (queries, keys.of_heads(chosen).take(~first)))
        key_of, speeds = [chosen.index(one) for one in places], rotary.rope.speeds(queries.vectors.shape[2])
        sink = np.zeros(len(k.positions), dtype=bool)
        if self.drop_sinks is not None:
            sink = sinks(q, k, key_of, speeds, geometry.first_key, self.drop_sinks)
        rest = k.take(np.flatnonzero(~sink))
        return Layer(run, geometry, queries.heads, q, rest, key_of, speeds, int(first.sum()), int(sink.sum()))

    def _before(self, run: Run, rotary: Rotary, side: str) -> LayerVectors:
        """As before RoPE: as captured so, else turned back."""
        if {"q_pre", "k_pre"} <= run.manifest.selection[rotary.layer].keys():
            return load(run, rotary.layer, f"{side}_pre", self.weights)
        found = load(run, rotary.layer, side, self.weights)
        return replace(found, vectors=rotary.before(found.vectors, found.positions))

    def _curves(self, here: Layer, edges: np.ndarray, distances: np.ndarray) -> tuple[dict[str, Any], np.ndarray, int]:
        """What tables of the layer hold; the logit of the average content at distances; how many rows are left out."""
        q, k, left_out, several = here.several()
        scaling = here.geometry.scaling
        sums = add_up(q, k, here.key_of, here.speeds, edges, here.geometry.first_key)
        if not sums.pairs.any():
            raise RunError(f"{here.where} has no pair of a query and a key before it: capture more")
        chosen = np.flatnonzero(sums.pairs)
        weight, edge = sums.weight[chosen], edges[chosen]
        values = {"observed": scaling * sums.observed[:, chosen] / weight}
        values |= {name: np.full_like(values["observed"], np.nan) for name in PARTS[1:]}
        alone = np.full((len(here.heads), len(distances)), np.nan)
        if several:
            parts = shares(sums, *apart(q, k, here.key_of))
            values |= {name: scaling * getattr(parts, name)[:, chosen] for name in PARTS[1:]}
            alone = scaling * at_distances(parts.average, here.speeds, distances)
        virtual = scaling * at_distances(sums.content[:, chosen] / weight[:, None], here.speeds, distances)
        real, put_at = np.repeat(edge, len(distances)), np.tile(distances, len(edge))
        shown = {
            "heads": self._falls(values, edge, weight),
            "curves": ({"distance": edge, "pairs": sums.pairs[chosen]}, values),
            "virtual": ({"distance": real, "virtual_distance": put_at}, {"logit": virtual}),
        }
        return shown, alone, left_out

    def _falls(self, values: dict[str, np.ndarray], edge: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
        """Mean logit of near pairs minus that of the farthest, and what of it is whose; NaN where all are near."""
        near, far = 2 * edge - 1 <= self.near, edge == edge[-1]
        if not near.any() or (near & far).any():
            near = far = np.zeros(len(edge), dtype=bool)
        found = {}
        for name in PARTS:
            ends = [values[name] @ np.where(some, weight, 0) / max(weight[some].sum(), 1e-300) for some in (near, far)]
            title = "fall" if name == "observed" else f"fall_{name}"
            found[title] = ends[0] - ends[1] if near.any() else np.full(len(ends[0]), np.nan)
        return found


def _side(rows: LayerVectors, rotary: Rotary) -> Side:
    """With stretches of positions by the sampler's buckets, some of them together where there are many."""
    buckets, cells = np.unique(rows.buckets, return_inverse=True)
    cells = cells * min(MOST_CELLS, len(buckets)) // len(buckets)
    planes = rotary.rope.planes(rows.vectors)
    return Side(planes, rows.positions.astype(np.int64), rows.example_ids, cells, rows.weights)


def _long(
    layer: int, heads: tuple[int, ...], along: dict[str, np.ndarray], values: dict[str, np.ndarray]
) -> pl.DataFrame:
    """A row for each head and place along the columns."""
    count = len(next(iter(along.values())))
    return pl.DataFrame(
        {
            "layer": np.full(len(heads) * count, layer, dtype=np.int16),
            "head": np.repeat(np.array(heads, dtype=np.int16), count),
            **{name: np.tile(column, len(heads)) for name, column in along.items()},
            **{name: value.ravel() for name, value in values.items()},
        }
    )
