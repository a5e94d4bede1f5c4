"""Which pairs of keys are compared: two of one document, near each other so that position is not the difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from ..common.rows import LayerVectors

RULES = ("bucket", "distance")


@dataclass(frozen=True)
class Pairs:
    """Row numbers of two keys per pair, and the later one's bucket. All heads share them."""

    first: Int[np.ndarray, " pairs"]
    second: Int[np.ndarray, " pairs"]
    buckets: Int[np.ndarray, " pairs"]

    def __len__(self) -> int:
        return len(self.first)


def draw_pairs(
    keys: LayerVectors,
    rule: str,
    count: int,
    rng: np.random.Generator,
    distance: float = 0.05,
    lengths: Mapping[int, int] | None = None,
) -> Pairs:
    """`count` pairs for each bucket that has any: a key by weight, then one of its partners, evenly.

    Args:
        rule: "bucket": partners share document and bucket. "distance": they share the document and lie at
            most `distance` times its length apart, neighbours always included.
        lengths: tokens of each document, which "distance" needs.
    """
    key = np.lexsort((keys.positions, keys.buckets if rule == "bucket" else np.zeros(len(keys)), keys.example_ids))
    low, high = _by_bucket(keys, key) if rule == "bucket" else _by_distance(keys, key, distance, lengths or {})
    first, second = [], []
    size = high - low
    buckets = keys.buckets[key]
    for bucket in np.unique(keys.buckets):
        able = np.flatnonzero((buckets == bucket) & (size > 1))
        if not len(able):
            continue
        weights = keys.weights[key[able]]
        anchor = rng.choice(able, size=count, p=weights / weights.sum())
        step = rng.integers(1, size[anchor])
        first.append(anchor)
        second.append(low[anchor] + (anchor - low[anchor] + step) % size[anchor])
    if not first:
        none = np.empty(0, dtype=np.int64)
        return Pairs(none, none, none)
    one, other = key[np.concatenate(first)], key[np.concatenate(second)]
    return Pairs(one, other, np.maximum(keys.buckets[one], keys.buckets[other]))


def _by_bucket(keys: LayerVectors, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row in this order, where its run of rows with the same document and bucket begins and ends."""
    examples, buckets = keys.example_ids[order], keys.buckets[order]
    starts = np.flatnonzero(np.r_[True, (np.diff(examples) != 0) | (np.diff(buckets) != 0)])
    run = np.searchsorted(starts, np.arange(len(order)), side="right") - 1
    return starts[run], np.r_[starts[1:], len(order)][run]


def _by_distance(
    keys: LayerVectors, order: np.ndarray, distance: float, lengths: Mapping[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """For each row in this order, the rows of its document that lie near enough: where they begin and end."""
    examples, positions = keys.example_ids[order], keys.positions[order].astype(np.int64)
    found, document = np.unique(examples, return_inverse=True)
    tokens = np.array([lengths.get(int(e), int(positions[document == d].max()) + 1) for d, e in enumerate(found)])
    reach = np.maximum(1, np.floor(distance * tokens)).astype(np.int64)[document]
    # One number per row that grows with (document, position): documents lie too far apart to reach each other.
    line = document * (4 * int(tokens.max()) + 4) + positions
    return np.searchsorted(line, line - reach, side="left"), np.searchsorted(line, line + reach, side="right")
