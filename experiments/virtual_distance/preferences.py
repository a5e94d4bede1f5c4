"""Which of two keys a query prefers, as they are and when only their distances change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from .core import FirstKey, Side, at_distances


@dataclass(frozen=True)
class Triples:
    """Queries and two keys of its document that each sees, as places among their rows."""

    query: Int[np.ndarray, " n"]
    one: Int[np.ndarray, " n"]
    other: Int[np.ndarray, " n"]


def draw_triples(queries: Side, keys: Side, count: int, first_key: FirstKey, seed: list[int]) -> Triples:
    """At most so many, drawn by the weights of all three; those whose two keys are one are left out."""
    rng, found = np.random.default_rng(seed), []
    texts = np.unique(queries.documents)
    shares_of = np.array([queries.weights[queries.documents == text].sum() for text in texts])
    for text, wanted in zip(texts.tolist(), rng.multinomial(count, shares_of / shares_of.sum()).tolist(), strict=True):
        found += list(_of_text(queries, keys, text, wanted, first_key, rng))
    places = np.concatenate(found, axis=1) if found else np.empty((3, 0), dtype=np.int64)
    return Triples(*places)


def _of_text(
    queries: Side, keys: Side, text: int, count: int, first_key: FirstKey, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    mine = np.flatnonzero(keys.documents == text)
    mine = mine[np.argsort(keys.positions[mine], kind="stable")]
    asking = np.flatnonzero(queries.documents == text)
    begin = np.searchsorted(keys.positions[mine], first_key(queries.positions[asking]), side="left")
    end = np.searchsorted(keys.positions[mine], queries.positions[asking], side="left")
    asking, begin, end = (values[end > begin] for values in (asking, begin, end))
    if not len(asking) or not count:
        return
    chosen = rng.choice(len(asking), size=count, p=queries.weights[asking] / queries.weights[asking].sum())
    running = np.concatenate([[0.0], np.cumsum(keys.weights[mine])])
    low, high = running[begin[chosen]], running[end[chosen]]
    drawn = [np.searchsorted(running, low + rng.random(count) * (high - low), side="right") - 1 for _ in range(2)]
    places = [mine[np.clip(one, begin[chosen], end[chosen] - 1)] for one in drawn]
    apart_from = places[0] != places[1]
    yield np.stack([asking[chosen], *places])[:, apart_from]


@dataclass(frozen=True)
class Preferences:
    """Of triples, the share in which the query prefers the same key of the two, for each head.

    `changed`: after the two keys have changed places; `together`: with both at each distance; `further`: with both
    moved away by it.
    """

    changed: Float64[np.ndarray, " heads"]
    together: Float64[np.ndarray, "heads distances"]
    further: Float64[np.ndarray, "heads distances"]


def preferences(
    queries: Side,
    keys: Side,
    key_of: list[int],
    speeds: Float64[np.ndarray, " planes"],
    triples: Triples,
    distances: Int[np.ndarray, " distances"],
) -> Preferences:
    """Which key wins, as the pairs are, and when only distances change; NaN where there are no triples."""
    if not len(triples.query):
        nothing = np.full((len(key_of), len(distances)), np.nan)
        return Preferences(nothing[:, 0], nothing, nothing)
    away = [queries.positions[triples.query] - keys.positions[place] for place in (triples.one, triples.other)]
    turns = [np.exp(-1j * one[:, None] * speeds) for one in away]
    changed, together, further = [], [], []
    for head, place in enumerate(key_of):
        asking = np.conj(queries.planes[head, triples.query])
        one, other = (asking * keys.planes[place, rows] for rows in (triples.one, triples.other))
        as_it_is = one * turns[0] - other * turns[1]
        wins = as_it_is.sum(1).real > 0
        changed.append((((one * turns[1] - other * turns[0]).sum(1).real > 0) == wins).mean())
        together.append(((at_distances(one - other, speeds, distances) > 0) == wins[:, None]).mean(0))
        further.append(((at_distances(as_it_is, speeds, distances) > 0) == wins[:, None]).mean(0))
    return Preferences(np.array(changed), np.stack(together), np.stack(further))
