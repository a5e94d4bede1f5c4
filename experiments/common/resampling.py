"""Confidence intervals by resampling documents (the cluster bootstrap; Efron, 1979).

Rows of one document are alike, so that many rows of few documents say less than their number. Documents, not rows, are
drawn anew with replacement, as many as there are, and what is measured is measured again of each draw: the percentiles
of what comes out are the interval. Windows of one text are drawn together. Where there are more than GROUPS of them,
they are first dealt into as many groups at random, which are drawn instead: this bounds the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int, Int64, Num

from sniffer.reader.run import Run

from .documents import text_of_each
from .moments import Moments
from .rows import LayerVectors

GROUPS = 32
CELLS = 1 << 22
"""Numbers that a batch of draws holds at most: 32 MiB."""


@dataclass(frozen=True)
class Draws:
    """`unit_of`: the unit of each example_id; `counts`: how often each draw has each unit; `documents`: how many."""

    unit_of: dict[int, int]
    counts: Float64[np.ndarray, "draws units"]
    documents: int

    @property
    def units(self) -> int:
        return self.counts.shape[1]

    def of(self, rows: LayerVectors) -> Int64[np.ndarray, " n"]:
        """The unit of each row."""
        ids, place = np.unique(rows.example_ids, return_inverse=True)
        return np.array([self.unit_of[number] for number in ids.tolist()], dtype=np.int64)[place]


def draw_documents(run: Run, draws: int, seed: int) -> Draws | None:
    """Draws of a run's documents, the same for every layer; None where there are fewer than two, or none are wanted."""
    texts = text_of_each(run)
    names = list(dict.fromkeys(texts.values()))
    if draws < 1 or len(names) < 2:
        return None
    rng = np.random.default_rng(seed)
    units = min(len(names), GROUPS)
    unit = dict(zip(names, rng.permutation(len(names)) % units, strict=True))
    counts = rng.multinomial(units, np.full(units, 1 / units), size=draws).astype(np.float64)
    return Draws({number: int(unit[text]) for number, text in texts.items()}, counts, len(names))


def percentiles(values: Num[np.ndarray, "draws ..."], level: float) -> tuple[np.ndarray, np.ndarray]:
    """The interval that holds so much of the draws, from and to; nan where a draw could not be measured."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.asarray(low), np.asarray(high)


def sums_by(
    units: int, unit: Int[np.ndarray, " n"], values: Float64[np.ndarray, "heads n ..."]
) -> Float64[np.ndarray, "units heads ..."]:
    """The sum of the rows of each unit."""
    member = np.zeros((units, len(unit)))
    member[unit, np.arange(len(unit))] = 1
    return np.stack([np.tensordot(member, head, axes=(1, 0)) for head in values], axis=1)


@dataclass(frozen=True)
class UnitSums:
    """What the moments of any draw follow from: weighted sums over each unit, about an origin common to all."""

    origin: Float64[np.ndarray, "heads dim"]
    origin_t: float
    weight: Float64[np.ndarray, " units"]
    first: Float64[np.ndarray, "units heads dim"]
    second: Float64[np.ndarray, "units heads dim dim"]
    first_t: Float64[np.ndarray, " units"]
    second_t: Float64[np.ndarray, " units"]
    with_t: Float64[np.ndarray, "units heads dim"]

    def of_draws(self, counts: Float64[np.ndarray, "draws units"]) -> Iterator[Moments]:
        """The moments of each draw, one after the other; nan where it has no rows."""
        batch = max(1, CELLS // self.second[0].size)
        for start in range(0, len(counts), batch):
            some = counts[start : start + batch]
            with np.errstate(invalid="ignore", divide="ignore"):
                share = some / (some @ self.weight)[:, None]
            sums = [np.tensordot(share, one, axes=1) for one in (self.first, self.second, self.with_t)]
            of_t = share @ self.first_t, share @ self.second_t
            for place, total in enumerate(some @ self.weight):
                mean, second, cross = (one[place] for one in sums)
                t, tt = float(of_t[0][place]), float(of_t[1][place])
                yield Moments(
                    float(total),
                    self.origin + mean,
                    second - mean[:, :, None] * mean[:, None, :],
                    self.origin_t + t,
                    tt - t**2,
                    cross - t * mean,
                )


def unit_sums(rows: LayerVectors, unit: Int64[np.ndarray, " n"], units: int, whole: Moments) -> UnitSums:
    """The sums of each unit's rows, about the mean of all (`whole`: the moments of all rows)."""
    heads, _, dim = rows.vectors.shape
    weight, first_t, second_t = (np.zeros(units) for _ in range(3))
    first, with_t = np.zeros((units, heads, dim)), np.zeros((units, heads, dim))
    second = np.zeros((units, heads, dim, dim))
    for one in range(units):
        mine = unit == one
        w = rows.weights[mine]
        x = rows.vectors[:, mine].astype(np.float64) - whole.mean[:, None]
        t = rows.positions[mine] - whole.mean_t
        weighted = x * w[:, None]
        weight[one], first_t[one], second_t[one] = w.sum(), w @ t, w @ t**2
        first[one], with_t[one] = weighted.sum(1), np.einsum("hnd,n->hd", weighted, t)
        second[one] = x.swapaxes(1, 2) @ weighted
    return UnitSums(whole.mean, whole.mean_t, weight, first, second, first_t, second_t, with_t)
