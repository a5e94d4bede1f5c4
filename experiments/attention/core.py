"""What a head's queries do with their keys, in a few numbers, and which kind of head that makes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

TYPES = ("sink", "previous", "induction", "local", "mixed")
"""In the order in which they are asked: a head is the first that it is."""


@dataclass(frozen=True)
class Attending:
    """All heads of a layer at the same queries.

    Attributes:
        entropy: in nats.
        first, itself, sink: weights of position 0, of the query's own, and of learned sinks.
        distance: weight of the keys by floor(log2(1 + distance)).
        key: the position with the largest logit.
        out_norm: of the head's output.
    """

    heads: tuple[int, ...]
    entropy: Float64[np.ndarray, "heads n"]
    first: Float64[np.ndarray, "heads n"]
    itself: Float64[np.ndarray, "heads n"]
    sink: Float64[np.ndarray, "heads n"]
    distance: Float64[np.ndarray, "heads n distances"]
    key: Int64[np.ndarray, "heads n"]
    out_norm: Float64[np.ndarray, "heads n"]
    positions: Int32[np.ndarray, " n"]
    example_ids: Int64[np.ndarray, " n"]
    weights: Float64[np.ndarray, " n"]

    def mean(self, values: np.ndarray, where: Bool[np.ndarray, " n"] | None = None) -> Float64[np.ndarray, " heads"]:
        """Over queries, by their weights; NaN where there are none."""
        weights = self.weights if where is None else self.weights * where
        total = weights.sum()
        return np.asarray(values @ weights / total) if total else np.full(len(self.heads), np.nan)


def relative_entropy(found: Attending) -> Float64[np.ndarray, " heads"]:
    """The mean of entropy over that of equal weights, log(position + 1); position 0, which has one key, is left out."""
    late = found.positions > 0
    most = np.log(np.maximum(found.positions, 1) + 1.0)
    return found.mean(found.entropy / most, late)


def mean_distance(found: Attending) -> Float64[np.ndarray, " heads"]:
    """The mean of floor(log2(1 + distance)) over all weight that lies on keys."""
    numbers = np.arange(found.distance.shape[2])
    on_keys = found.mean(found.distance.sum(2))
    return np.divide(
        found.mean(found.distance @ numbers), on_keys, out=np.full(len(found.heads), np.nan), where=on_keys > 0
    )


def near(found: Attending, local: int) -> Float64[np.ndarray, " heads"]:
    """Mean weight of the keys less than `local` positions away, one less than a power of two."""
    return found.mean(found.distance[:, :, : local.bit_length()].sum(2))


def previous(found: Attending) -> Float64[np.ndarray, " heads"]:
    """The share of queries whose largest weight is on the position before them."""
    late = found.positions > 0
    return found.mean((found.key == found.positions - 1).astype(np.float64), late)


def induction(found: Attending, tokens: dict[int, np.ndarray]) -> tuple[Float64[np.ndarray, " heads"], int]:
    """The share of queries whose largest weight is on what came after their own token, earlier in the text.

    Of queries whose token occurs before, and those alone; their number comes with it. Source: Olsson and others,
    "In-context Learning and Induction Heads", 2022.

    Args:
        tokens: the token ids of each document.
    """
    able = np.zeros(len(found.positions), dtype=bool)
    hits = np.zeros(found.key.shape, dtype=np.float64)
    for example in np.unique(found.example_ids):
        ids, mine = tokens[int(example)], np.flatnonzero(found.example_ids == example)
        for place in mine:
            position = int(found.positions[place])
            # Position 1 + n comes after the token at n, and must be one that the query can see.
            before = np.flatnonzero(ids[:position] == ids[position])
            able[place] = len(before) > 0
            hits[:, place] = np.isin(found.key[:, place] - 1, before)
    return found.mean(hits, able), int(able.sum())


def types_of(numbers: dict[str, Float64[np.ndarray, " heads"]], threshold: float) -> list[str]:
    """What each head is by its numbers: the first of TYPES whose number reaches the threshold."""
    said = {
        "sink": numbers["first"] + numbers["sink"],
        "previous": numbers["previous"],
        "induction": numbers["induction"],
        "local": numbers["near"],
    }
    heads = len(numbers["first"])
    # A comparison with NaN is false.
    return [next((name for name in TYPES[:-1] if said[name][head] >= threshold), TYPES[-1]) for head in range(heads)]
