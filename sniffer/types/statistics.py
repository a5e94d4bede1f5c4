"""Statistics of attention: what a sampled query does with all of its keys, and how that lies in a row.

A row of kind `attention` belongs to one query and query head. Its statistics are columns; in memory they lie side by
side in one float32 array, as a vector's values do, whole numbers among them as their bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float64

from sniffer.types.kinds import ATTENTION, KIND
from sniffer.types.models import LayerGeometry

STATISTICS = {
    "lse": "natural logarithm of the sum of exponentials of the logits, sinks among them",
    "entropy": "of the weights, sinks among them, in nats",
    "max_logit": "the largest logit over keys; max_position is where",
    "first": "weight of position 0",
    "self": "weight of the query's own position",
    "sink": "weight of the sinks that a layer has learned; 0 where it has none",
    "mass": "weight of the keys in each of the sampler's buckets",
    "distance": "weight of the keys by floor(log2(1 + distance)), 0 being the query's own position",
    "section": "weight of the keys in each of the sections that capture.attention_sections names, in its order",
    "top": "the largest weights, in descending order; top_position is where. Fewer keys leave 0 at position -1",
    "out_norm": "Euclidean norm of the head's output, the sum of weights times values",
    "out": "the head's output",
}
"""What may be asked for, in the order of columns."""

ALL_STATISTICS = tuple(name for name in STATISTICS if name not in ("out", "section"))
"""What `all` stands for; with it goes `section` where sections are named."""


@dataclass(frozen=True)
class Column:
    """One column of a row's values. `width` is None for one number a row, else how many a row has."""

    name: str
    width: int | None = None
    whole: bool = False

    @property
    def values(self) -> int:
        return 1 if self.width is None else self.width


def columns_of(layer: LayerGeometry, kind: str, layout: AttentionLayout | None) -> tuple[Column, ...]:
    """The columns of a kind's values at one layer.

    Raises:
        ValueError: of statistics, where no layout says which.
    """
    if not KIND[kind].statistics:
        return (Column("vector", layer.dims[kind]),)
    if layout is None:
        raise ValueError(f"kind {kind} without a layout of its columns")
    return layout.columns(layer.dims["v"])


@dataclass(frozen=True)
class AttentionLayout:
    """What a run keeps of attention.

    `statistics` are names of STATISTICS, in its order. `buckets` and `distances` count those of the longest document
    that there may be, `top` the weights of a row. `sections` are the names of those whose weight is kept.
    """

    statistics: tuple[str, ...]
    buckets: int
    distances: int
    top: int
    sections: tuple[str, ...] = ()

    def columns(self, value_dim: int) -> tuple[Column, ...]:
        """Of a layer whose values have so many numbers."""
        return tuple(column for name in self.statistics for column in self._columns(name, value_dim))

    def width(self, value_dim: int) -> int:
        """Numbers in a row."""
        return sum(column.values for column in self.columns(value_dim))

    def _columns(self, name: str, value_dim: int) -> Iterable[Column]:
        match name:
            case "max_logit":
                return Column(name), Column("max_position", whole=True)
            case "mass":
                return (Column(name, self.buckets),)
            case "distance":
                return (Column(name, self.distances),)
            case "section":
                return (Column("section_mass", len(self.sections)),)
            case "top":
                return Column(name, self.top), Column("top_position", self.top, whole=True)
            case "out":
                return (Column(name, value_dim),)
        return (Column(name),)

    def of_layer(self, layer: LayerGeometry) -> LayerGeometry:
        """A layer's geometry with the kind of statistics, which has a row for each query head."""
        heads = {**layer.heads, ATTENTION: layer.heads["q"]}
        return replace(layer, heads=heads, dims={**layer.dims, ATTENTION: self.width(layer.dims["v"])})

    def as_json(self) -> dict[str, Any]:
        told = {**asdict(self), "statistics": list(self.statistics), "sections": list(self.sections)}
        return told if self.sections else {name: value for name, value in told.items() if name != "sections"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AttentionLayout:
        numbers = values["buckets"], values["distances"], values["top"]
        return cls(tuple(values["statistics"]), *numbers, tuple(values.get("sections", ())))


@dataclass(frozen=True)
class ScoreFacts:
    """What the logits of a layer are made of beside scaling * q.k, found from a probe (forward/attention/facts.py).

    `softcap` bounds them, `sinks` and `alibi` have a number for each query head: a logit beside those of the keys, and
    what a key's position adds to it for each token. `missing` says why logits cannot be had from q and k; empty where
    they can.
    """

    softcap: float | None = None
    sinks: tuple[float, ...] | None = None
    alibi: tuple[float, ...] | None = None
    missing: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ScoreFacts:
        sinks, alibi = (None if values.get(name) is None else tuple(values[name]) for name in ("sinks", "alibi"))
        return cls(values.get("softcap"), sinks, alibi, values.get("missing", ""))

    def logits(self, products: Float64[np.ndarray, "queries keys"], scaling: float, keys: Any, head: int) -> Any:
        """From q.k of one query head; `keys` are the positions of the keys."""
        found = products * scaling
        if self.softcap is not None:
            found = self.softcap * np.tanh(found / self.softcap)
        return found if self.alibi is None else found + self.alibi[head] * keys
