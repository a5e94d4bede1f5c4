"""One layer of a run, document by document: what its queries do with all keys and values, exactly.

Logits are those of `run.scores`: masks, windows, chunks, scale, soft cap, sinks and ALiBi as the manifest tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.reader.scores import facts_of, logits_of
from sniffer.types import LayerGeometry, ScoreFacts

from ..common.rows import LayerVectors, key_places, load
from .core import sums_before, weights

SAME = 0.02
"""By how much keys may be off those before RoPE once they are turned, over the largest number; bfloat16 gives 4e-3."""
LOOKED_AT = 1000
"""Rows of a layer whose keys are compared with those before RoPE."""


@dataclass(frozen=True)
class Text:
    """A document: where its keys lie among the layer's rows, and the queries looked at.

    `logits` are (heads, queries, keys), `sums` the same for sums of weights over the queries before.
    """

    keys: slice
    queries: np.ndarray
    logits: np.ndarray
    sums: np.ndarray

    @property
    def seen(self) -> np.ndarray:
        """(queries, keys): whether a key lies in a query's window and before it."""
        return np.asarray(np.isfinite(self.logits[0]))


@dataclass(frozen=True)
class Layer:
    """All captured rows of a layer. `key_of` and `value_of` are the places of each query head's key and value head."""

    geometry: LayerGeometry
    facts: ScoreFacts
    queries: LayerVectors
    keys: LayerVectors
    values: LayerVectors
    key_of: list[int]
    value_of: list[int]

    @classmethod
    def of(cls, run: Run, some: Run, layer: int, weighted: str) -> Layer:
        """Reads a layer; queries are those of `some`, which may be a few sections of the run.

        Raises:
            RunError: not captured, or its logits cannot be had from q and k.
        """
        facts = facts_of(run, layer)
        queries, keys, values = load(some, layer, "q", weighted), *(in_order(load(run, layer, kind)) for kind in "kv")
        places = key_places(run, queries, keys), key_places(run, queries, values)
        return cls(run.manifest.layer(layer), facts, queries, keys, values, *places)

    @cached_property
    def sinks(self) -> np.ndarray | None:
        sinks = self.facts.sinks
        return None if sinks is None else np.array([sinks[head] for head in self.queries.heads])

    def texts(self, lengths: dict[int, int], count: int, history: int) -> Iterator[Text]:
        """Each document that has queries: `count` of them at most, and sums over `history` at most, evenly spaced.

        Args:
            lengths: tokens of each document.

        Raises:
            RunError: keys of a document are missing.
        """
        for example in np.unique(self.queries.example_ids).tolist():
            mine = np.flatnonzero(self.queries.example_ids == example)
            mine = mine[np.argsort(self.queries.positions[mine])]
            theirs = slice(*np.searchsorted(self.keys.example_ids, [example, example + 1]))
            if not np.array_equal(self.keys.positions[theirs], np.arange(lengths[example])):
                raise RunError(
                    f"layer {self.geometry.layer} lacks keys of example {example}: `runs resume` completes it"
                )
            chosen, earlier = mine[_evenly(len(mine), count)], mine[_evenly(len(mine), history)]
            sums = np.concatenate([self._sums(one, chosen, earlier, theirs) for one in range(len(self.key_of))])
            yield Text(theirs, chosen, self.logits(chosen, theirs, self.keys.vectors), sums)

    def _sums(self, place: int, queries: np.ndarray, earlier: np.ndarray, keys: slice) -> np.ndarray:
        """(1, queries, keys) of one query head, since the weights of many queries of all heads are many."""
        sinks = None if self.sinks is None else self.sinks[[place]]
        before = weights(self.logits(earlier, keys, self.keys.vectors, [place]), sinks)
        at, places = (self.queries.positions[rows] for rows in (queries, earlier))
        return sums_before(at, before, places, self.queries.weights[earlier])

    def logits(
        self, queries: np.ndarray, keys: slice, vectors: np.ndarray, heads: list[int] | None = None
    ) -> np.ndarray:
        """(heads, queries, keys) of some rows; `vectors` are all keys of the layer, as they are or changed.

        `heads`: places of query heads; None for all.
        """
        at, to = self.queries.positions[queries], self.keys.positions[keys]
        wanted = list(range(len(self.key_of))) if heads is None else heads
        wide = {place: vectors[place, keys].astype(np.float64) for place in {self.key_of[one] for one in wanted}}
        told = self.geometry, self.facts
        return np.stack(
            [
                logits_of(*told, self.queries.heads[n], self.queries.vectors[n, queries], wide[self.key_of[n]], at, to)
                for n in wanted
            ]
        )

    def outputs(self, shares: np.ndarray, keys: slice, vectors: np.ndarray) -> np.ndarray:
        """(heads, queries, dim): sums of values by weights (heads, queries, keys); `vectors` are all of the layer's."""
        wide = {place: vectors[place, keys].astype(np.float64) for place in set(self.value_of)}
        return np.stack([share @ wide[place] for share, place in zip(shares, self.value_of, strict=True)])


Turn = Callable[[np.ndarray], np.ndarray]


def before_rope(run: Run, keys: LayerVectors, longest: int) -> tuple[LayerVectors | None, Turn, str]:
    """The keys before RoPE and what turns them, or why they cannot be had.

    Raises:
        RunError: turned, they are not the keys.
    """
    if "k_pre" not in run.manifest.selection[keys.layer]:
        return None, as_they_are, "k_pre was not captured"
    try:
        rope = run.rope(keys.layer)
    except RunError as error:
        return None, as_they_are, str(error)
    if rope.until is not None and longest > rope.until:
        return None, as_they_are, f"texts of more than {rope.until:,} tokens turn otherwise"
    found = in_order(load(run, keys.layer, "k_pre"))
    if found.heads != keys.heads:
        return None, as_they_are, "heads of k_pre are others than those of k"
    some = _evenly(len(keys), LOOKED_AT)
    turned = rope.turned(found.vectors[:, some], found.positions[some])
    off = np.abs(turned - keys.vectors[:, some]).max() / np.abs(keys.vectors[:, some]).max()
    if not off <= SAME:
        raise RunError(
            f"k_pre of layer {keys.layer} in {run.folder}, turned as the manifest tells, is not k (off by {off:.1%}): "
            "leave the layer out with layers=..., and please report this"
        )
    return found, rope.at(found.positions), ""


def as_they_are(vectors: np.ndarray) -> np.ndarray:
    return vectors


def in_order(rows: LayerVectors) -> LayerVectors:
    """The same rows, documents one after the other, each by position."""
    return rows.take(np.lexsort((rows.positions, rows.example_ids)))


def _evenly(there: int, count: int) -> np.ndarray:
    """Places of at most so many of a list, the first and the last among them."""
    return np.unique(np.linspace(0, there - 1, min(count, there)).round().astype(np.int64))
