"""One layer of a run as arrays: every captured head at once.

All heads of a layer and kind were kept at the same positions, so a layer is one array (heads, rows, dim)
beside one list of positions. An analysis goes through the layers one by one and never through the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float32, Float64, Int32, Int64

from sniffer.errors import ConfigError, RunError, first_line
from sniffer.forward.numbers import numbers
from sniffer.reader.run import Run
from sniffer.storage.finite import count_not_finite

WEIGHTS = ("positions", "rows")
MIN_ROWS = 8
SHOWN = 6
"""Layers and kinds that an error names."""


@dataclass(frozen=True)
class LayerVectors:
    """The captured vectors of one layer and kind, ordered by (bucket, example, position).

    `weights` say how much each row counts, see `load`.
    """

    layer: int
    kind: str
    heads: tuple[int, ...]
    vectors: Float32[np.ndarray, "heads n dim"]
    positions: Int32[np.ndarray, " n"]
    buckets: Int32[np.ndarray, " n"]
    example_ids: Int64[np.ndarray, " n"]
    weights: Float64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, rows: Any) -> LayerVectors:
        """Some of the rows, of every head; `rows` is a mask or a list of row numbers."""
        return replace(
            self,
            vectors=self.vectors[:, rows],
            positions=self.positions[rows],
            buckets=self.buckets[rows],
            example_ids=self.example_ids[rows],
            weights=self.weights[rows],
        )

    def of_heads(self, places: Sequence[int]) -> LayerVectors:
        """The heads at these places, which may repeat: a key head serves several query heads."""
        return replace(self, heads=tuple(self.heads[p] for p in places), vectors=self.vectors[list(places)])


def load(run: Run, layer: int, kind: str, weights: str = "positions") -> LayerVectors:
    """Reads all heads of one layer and kind.

    Args:
        weights: "positions" weights a row by the inverse of its inclusion probability, so that sums
            over rows estimate sums over all positions without bias (Horvitz and Thompson, 1952).
            "rows" counts every row once, so that densely sampled positions count for more.

    Raises:
        ConfigError: unknown weights.
        RunError: not captured, unreadable, too few rows to say anything, or numbers that are not finite.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights} must be one of {', '.join(WEIGHTS)}")
    heads = run.heads(layer, kind)
    run.check(layer, kind)
    table = run.scan([layer], [kind], inclusion_probability=True).sort("head", "bucket", "example_id", "position")
    where = f"layer {layer}, kind {kind} of {run.folder}"
    try:
        rows = table.drop("layer", "kind", "token_id").collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunError(
            f"{where} cannot be read ({first_line(error)}): `python -m sniffer.runs verify {run.folder}` names the file"
        ) from error
    n = len(rows) // len(heads)
    if n < MIN_ROWS:
        raise RunError(f"{where} has {n} rows per head, too few: capture more with sampler.base_rate or examples")
    vectors = rows["vector"].to_numpy().reshape(len(heads), n, -1)
    if found := count_not_finite(vectors.reshape(len(rows), -1)):
        raise RunError(
            f"{where} holds infinite or undefined numbers (of {len(rows):,} vectors {found}): leave the layer out with "
            "layers=..."
        )
    first = rows.head(n)
    probability = first["inclusion_probability"].to_numpy()
    if weights == "positions" and np.isnan(probability).any():
        raise RunError(
            f"{run.folder} was imported without its sampler, so that rows cannot be weighted by it: take weights=rows, "
            "or import it with --sampler"
        )
    return LayerVectors(
        layer=layer,
        kind=kind,
        heads=heads,
        vectors=vectors,
        positions=first["position"].to_numpy(),
        buckets=first["bucket"].to_numpy(),
        example_ids=first["example_id"].to_numpy(),
        weights=1 / probability if weights == "positions" else np.ones(n),
    )


def has_rows(run: Run, layer: int, kind: str) -> bool:
    """Whether there are as many rows of each head as `load` wants."""
    rows = sum(part.rows for part in run.manifest.parts_of(layer, kind))
    return rows >= MIN_ROWS * len(run.heads(layer, kind))


def of_sections(run: Run, sections: Sequence[str] | None) -> Run:
    """The run as if it had the rows of these sections only; None for all.

    Raises:
        ConfigError: a list that names nothing.
        RunError: the run has no sections, or none of that name; the message says which there are.
    """
    if sections is None:
        return run
    if not sections:
        raise ConfigError("sections=[] names nothing: use null for all")
    return run.only(sections)


def load_queries_and_keys(run: Run, layer: int, weights: str = "positions") -> tuple[LayerVectors, LayerVectors]:
    """The queries of a layer and, head for head, the keys that each of them attends with (grouped-query attention).

    Raises:
        RunError: as `load`; or the keys of a captured query head were not captured.
    """
    return align(run, load(run, layer, "q", weights), load(run, layer, "k", weights))


def align(run: Run, queries: LayerVectors, keys: LayerVectors) -> tuple[LayerVectors, LayerVectors]:
    """The keys with one head per query head."""
    return queries, keys.of_heads(key_places(run, queries, keys))


def key_places(run: Run, queries: LayerVectors, keys: LayerVectors) -> list[int]:
    """For each query head, the place among `keys.heads` of the head that it attends with."""
    geometry = run.manifest.layer(queries.layer)
    wanted = [geometry.key_head(head, keys.kind) for head in queries.heads]
    missing = sorted(set(wanted) - set(keys.heads))
    if missing:
        raise RunError(f"key heads {missing} of layer {queries.layer} were not captured, but their query heads were")
    return [keys.heads.index(head) for head in wanted]


def chosen_layers(run: Run, layers: Any, *kinds: str) -> list[int]:
    """The layers to analyse: those asked for, else all; each must hold every kind.

    Raises:
        ConfigError: `layers` cannot be read.
        RunError: a layer or a kind was not captured, or holds numbers that are not finite; or documents have no rows of
            their beginning.
    """
    if run.branches:
        raise RunError(
            f"{run.folder} has {run.branches} documents with rows from where they part from another alone, as beams "
            "do, and analyses take whole texts: capture without beams, or read it with open_run"
        )
    wanted = numbers("layers", layers)
    chosen = list(run.layers if wanted is None else wanted)
    lacking = [kind for kind in kinds if kind not in run.kinds]
    if lacking:
        raise RunError(
            f"{run.folder} has kinds {', '.join(run.kinds)}, and this needs {', '.join(kinds)}: "
            f"capture with 'capture.kinds=[{','.join(dict.fromkeys([*run.kinds, *kinds]))}]'"
        )
    for layer in chosen:
        for kind in kinds:
            run.heads(layer, kind)
    _refuse_not_finite(run, chosen, kinds)
    return chosen


def _refuse_not_finite(run: Run, layers: Sequence[int], kinds: Sequence[str]) -> None:
    """Before anything is computed: no mean, product or distance of such vectors says anything.

    Raises:
        RunError: naming every layer and kind that holds numbers which are not finite, as far as the manifest says.
    """
    found = {
        layer: {kind: counts[kind] for kind in kinds if kind in counts}
        for layer, counts in run.manifest.not_finite.items()
        if layer in layers
    }
    named = [f"layer {layer} {kind} ({count})" for layer, counts in found.items() for kind, count in counts.items()]
    if named:
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        others = [str(layer) for layer in layers if not found.get(layer)]
        advice = f"leave them out with 'layers=[{','.join(others)}]'" if others else "capture it in another model.dtype"
        raise RunError(f"{run.folder} holds vectors that are not finite: {', '.join(named[:SHOWN])}{more}: {advice}")
