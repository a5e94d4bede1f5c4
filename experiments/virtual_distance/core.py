"""Logits of pairs at distances that they do not have, and what of the curve over real distances is whose.

Before RoPE a vector is a complex number for each pair of dimensions, and the logit of a query d positions after a key

    L(d) = scaling * Re sum_f conj(q_f) k_f exp(-i w_f d)          w_f = 0 where a dimension does not turn

so that sums of conj(q) k over pairs say what all of these pairs would have at any distance. Pairs are those of one
document, a key before a query and within the layer's window, each by the product of its weights. Of all pairs at
distances in a range:

    observed   the mean of L at the distance that each pair has
    rope       the same if every pair had the average content: what RoPE alone makes of distance
    drift      what it is more if every pair had the content that is average at its two positions
    content    and more again with its own: what a query has to do with keys so far before it in its own text

The average content at two positions is taken over pairs of different documents, which share nothing but where they
are. The three add up to what is observed, exactly. No pair is formed: keys at a range of distances from a query lie
side by side once they are sorted, and sums over them are differences of two running sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Complex128, Float64, Int

CELLS = 1 << 22
"""Complex numbers that are held at a time."""

FirstKey = Callable[[np.ndarray], np.ndarray]
"""The first position that queries at some positions see."""


@dataclass(frozen=True)
class Side:
    """Queries or keys of one layer before RoPE; `cells` number stretches of positions, from 0."""

    planes: Complex128[np.ndarray, "heads n planes"]
    positions: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " n"]
    cells: Int[np.ndarray, " n"]
    weights: Float64[np.ndarray, " n"]

    def take(self, rows: np.ndarray) -> Side:
        """Some of the rows, of every head."""
        return Side(
            self.planes[:, rows], self.positions[rows], self.documents[rows], self.cells[rows], self.weights[rows]
        )

    def turned(self, speeds: Float64[np.ndarray, " planes"]) -> Complex128[np.ndarray, "heads n planes"]:
        """As after RoPE."""
        return self.planes * np.exp(1j * self.positions[:, None] * speeds)


@dataclass(frozen=True)
class Sums:
    """Sums over the pairs of each range of distances, by their weights.

    `pairs` counts them, `weight` adds their weights. `observed` are sums of q.k as they are, `content` of conj(q) k,
    `phases` of exp(-i w d) by the cells of query and key. q.k is before scaling.
    """

    pairs: Int[np.ndarray, " ranges"]
    weight: Float64[np.ndarray, " ranges"]
    observed: Float64[np.ndarray, "heads ranges"]
    content: Complex128[np.ndarray, "heads ranges planes"]
    phases: Complex128[np.ndarray, "ranges cells_q cells_k planes"]
    met: Float64[np.ndarray, "cells_q cells_k"]


def ranges_of(longest: int) -> Int[np.ndarray, " edges"]:
    """1, 2, 4, ...: ranges of distances from each to before the next, up to the longest."""
    return 1 << np.arange(max(1, int(longest).bit_length()) + 1)


def add_up(
    queries: Side,
    keys: Side,
    key_of: list[int],
    speeds: Float64[np.ndarray, " planes"],
    edges: Int[np.ndarray, " edges"],
    first_key: FirstKey,
) -> Sums:
    """Sums over all pairs of each document; `key_of` are the places of the key heads that query heads attend with."""
    heads, _, planes = queries.planes.shape
    n, cells = len(edges) - 1, (int(queries.cells.max()) + 1, int(keys.cells.max()) + 1)
    found = Sums(
        np.zeros(n, dtype=np.int64),
        np.zeros(n),
        np.zeros((heads, n)),
        np.zeros((heads, n, planes), dtype=np.complex128),
        np.zeros((n, *cells, planes), dtype=np.complex128),
        np.zeros(cells),
    )
    for text in np.unique(queries.documents).tolist():
        there = keys.take(np.flatnonzero(keys.documents == text))
        mine = np.flatnonzero(queries.documents == text)
        if len(there.positions):
            size = max(1, CELLS // ((len(keys.planes) + 1) * n * planes))
            for start in range(0, len(mine), size):
                _add(found, queries.take(mine[start : start + size]), there, key_of, speeds, edges, first_key)
    return found


def _add(
    found: Sums,
    queries: Side,
    keys: Side,
    key_of: list[int],
    speeds: Float64[np.ndarray, " planes"],
    edges: Int[np.ndarray, " edges"],
    first_key: FirstKey,
) -> None:
    """Queries of one document with its keys: vectors over all of these, phases cell by cell."""
    keys = keys.take(np.argsort(keys.positions, kind="stable"))
    at, first = queries.positions[:, None], first_key(queries.positions)[:, None]
    reach = _reach(keys.positions, at, first, edges)
    found.pairs[:] += (reach[1] - reach[0]).sum(0)
    own = (np.conj(side) * queries.weights[:, None] for side in (queries.planes, queries.turned(speeds)))
    theirs = (_between(side * keys.weights[:, None], reach) for side in (keys.planes, keys.turned(speeds)))
    for turned, (asking, asked) in enumerate(zip(own, theirs, strict=True)):
        for head, place in enumerate(key_of):
            if turned:
                found.observed[head] += np.einsum("nf,nbf->b", asking[head], asked[place]).real
            else:
                found.content[head] += np.einsum("nf,nbf->bf", asking[head], asked[place])
    back = np.exp(-1j * at * speeds)[:, None] * queries.weights[:, None, None]
    for cell in np.unique(keys.cells).tolist():
        here = keys.take(np.flatnonzero(keys.cells == cell))
        reach = _reach(here.positions, at, first, edges)
        phases = _between(here.weights[:, None] * np.exp(1j * here.positions[:, None] * speeds), reach) * back
        weights = _between(here.weights[:, None], reach)[..., 0] * queries.weights[:, None]
        found.weight[:] += weights.sum(0)
        for mine in np.unique(queries.cells).tolist():
            inside = queries.cells == mine
            found.phases[:, mine, cell] += phases[inside].sum(0)
            found.met[mine, cell] += weights[inside].sum()


def _reach(
    positions: np.ndarray, at: np.ndarray, first: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """From which to before which key, in the order of positions, the distance of each query is in each range."""
    end = np.searchsorted(positions, at - edges[None, :-1], side="right")
    begin = np.searchsorted(positions, np.maximum(at - edges[None, 1:] + 1, first), side="left")
    return np.minimum(begin, end), end


def _between(values: np.ndarray, reach: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Sums of rows (..., n, width) from some to before others: (..., *shape of these, width)."""
    nothing = np.zeros((*values.shape[:-2], 1, values.shape[-1]), dtype=values.dtype)
    running = np.concatenate([nothing, np.cumsum(values, axis=-2)], axis=-2)
    return np.asarray(running[..., reach[1], :] - running[..., reach[0], :])


def apart(
    queries: Side, keys: Side, key_of: list[int]
) -> tuple[Complex128[np.ndarray, "heads cells_q cells_k planes"], Float64[np.ndarray, "cells_q cells_k"]]:
    """Sums of conj(q) k over pairs of different documents by the cells of both, and of their weights."""
    texts = np.unique(np.concatenate([queries.documents, keys.documents]))
    q, nq = _by_cell(queries, texts)
    k, nk = _by_cell(keys, texts)
    weight = np.outer(nq.sum(0), nk.sum(0)) - nq.T @ nk
    found = []
    for head, place in enumerate(key_of):
        all_pairs = np.einsum("af,bf->abf", np.conj(q[head].sum(0)), k[place].sum(0))
        found.append(all_pairs - np.einsum("taf,tbf->abf", np.conj(q[head]), k[place]))
    return np.stack(found), weight


def _by_cell(side: Side, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums (heads, texts, cells, planes) and weights (texts, cells)."""
    heads, _, planes = side.planes.shape
    cells = int(side.cells.max()) + 1
    sums = np.zeros((heads, len(texts), cells, planes), dtype=np.complex128)
    weights = np.zeros((len(texts), cells))
    places = np.searchsorted(texts, side.documents) * cells + side.cells
    order = np.argsort(places, kind="stable")
    there, first = np.unique(places[order], return_index=True)
    at = there // cells, there % cells
    sums[:, *at] = np.add.reduceat((side.planes * side.weights[:, None])[:, order], first, axis=1)
    weights[at] = np.add.reduceat(side.weights[order], first)
    return sums, weights


def in_several(side: Side) -> Bool[np.ndarray, " n"]:
    """Which rows are in cells that two documents or more have rows of."""
    both = np.unique(np.stack([side.cells, side.documents]), axis=1)
    counts = np.bincount(both[0], minlength=int(side.cells.max(initial=0)) + 1)
    return np.asarray(counts[side.cells] > 1)


@dataclass(frozen=True)
class Shares:
    """Mean logits by range of distances, all before scaling; `average` is the average content of a pair."""

    observed: Float64[np.ndarray, "heads ranges"]
    rope: Float64[np.ndarray, "heads ranges"]
    drift: Float64[np.ndarray, "heads ranges"]
    content: Float64[np.ndarray, "heads ranges"]
    average: Complex128[np.ndarray, "heads planes"]


def shares(sums: Sums, between: np.ndarray, weight: Float64[np.ndarray, "cells_q cells_k"]) -> Shares:
    """What of the observed curve is whose; `between` and `weight` as `apart` gives them, of at least two documents."""
    total = np.maximum(sums.weight, np.finfo(float).tiny)
    known = sums.met > 0
    mean = np.zeros_like(between)
    mean[:, known] = between[:, known] / weight[known][:, None]
    average = np.einsum("habf,ab->hf", mean, sums.met) / sums.met.sum()
    observed = sums.observed / total
    rope = np.einsum("hf,rf->hr", average, sums.phases.sum((1, 2))).real / total
    placed = np.einsum("habf,rabf->hr", mean, sums.phases).real / total
    return Shares(observed, rope, placed - rope, observed - placed, average)


def at_distances(
    content: Complex128[np.ndarray, "*some planes"],
    speeds: Float64[np.ndarray, " planes"],
    distances: Int[np.ndarray, " distances"],
) -> Float64[np.ndarray, "*some distances"]:
    """Re sum conj(q) k exp(-i w d), from conj(q) k, at each distance."""
    return np.asarray((content @ np.exp(-1j * speeds[:, None] * distances)).real)


def sinks(
    queries: Side,
    keys: Side,
    key_of: list[int],
    speeds: Float64[np.ndarray, " planes"],
    first_key: FirstKey,
    beyond: float,
) -> Bool[np.ndarray, " n"]:
    """Keys that all queries favour, whatever these hold: by the mean of q.k over the queries that see them.

    A key is one if in the median head that mean is more than `beyond` deviations above the median key; deviations are
    1.4826 times the median absolute one, which is the standard deviation of a normal distribution.
    """
    means = np.full((len(key_of), len(keys.positions)), np.nan)
    for text in np.unique(keys.documents).tolist():
        some = np.flatnonzero(queries.documents == text)
        asking = queries.take(some[np.argsort(queries.positions[some], kind="stable")])
        mine = np.flatnonzero(keys.documents == text)
        here = keys.take(mine)
        begin = np.searchsorted(asking.positions, here.positions, side="right")
        end = np.searchsorted(first_key(asking.positions), here.positions, side="right")
        reach = np.minimum(begin, end), end
        weight = _between(asking.weights[:, None], reach)[..., 0]
        sums = _between(np.conj(asking.turned(speeds)) * asking.weights[:, None], reach)
        products = (sums * here.turned(speeds)[key_of]).sum(-1).real
        means[:, mine] = np.where(weight > 0, products / np.maximum(weight, np.finfo(float).tiny), np.nan)
    seen = ~np.isnan(means[0])
    if not seen.any():
        return seen
    off = means[:, seen] - np.median(means[:, seen], axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(off), axis=1, keepdims=True)
    found = np.zeros(len(seen), dtype=bool)
    found[seen] = np.median(off > beyond * spread, axis=0) > 0.5
    return found
