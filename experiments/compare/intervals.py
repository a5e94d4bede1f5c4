"""Intervals: of a number that groups of documents give again, of the difference of two such, and of a correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import norm, rankdata
from scipy.stats import t as student

LEAST_RUNS = 4
"""Below so many pairs a correlation has no interval."""


@dataclass(frozen=True)
class Spread:
    """The standard error of some numbers, and its degrees of freedom (Welch, 1947, where two are put together)."""

    error: Float64[np.ndarray, " numbers"]
    freedom: Float64[np.ndarray, " numbers"]

    def reach(self, level: float) -> Float64[np.ndarray, " numbers"]:
        """How far an interval about the number reaches to either side; nan where there is none."""
        with np.errstate(invalid="ignore"):
            return np.asarray(student.ppf((1 + level) / 2, self.freedom) * self.error)


def spread_of(value: Float64[np.ndarray, " numbers"], groups: Float64[np.ndarray, "numbers groups"]) -> Spread:
    """Of numbers that groups give again: about the number of the whole, not about the groups' mean (Wolter's v2).

    Of groups, a number may come out otherwise for being of fewer rows, as a rank does; so that counts too, and an
    interval is rather too wide. nan where a group has no number.
    """
    count = groups.shape[1]
    if count < 2:
        return Spread(np.full(len(groups), np.nan), np.zeros(len(groups)))
    error = np.sqrt(((groups - value[:, None]) ** 2).sum(1) / (count * (count - 1)))
    return Spread(error, np.full(len(groups), count - 1.0))


def spread_of_difference(
    one: tuple[Float64[np.ndarray, " numbers"], Float64[np.ndarray, "numbers groups"]],
    other: tuple[Float64[np.ndarray, " numbers"], Float64[np.ndarray, "numbers others"]],
    paired: bool,
) -> Spread:
    """Of other - one, each its numbers and those of its groups.

    `paired`: group by group the documents are the same, so that what they have in common cancels.
    """
    if paired:
        return spread_of(other[0] - one[0], other[1] - one[1])
    first, second = spread_of(*one), spread_of(*other)
    a, b = first.error**2, second.error**2
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = (a + b) ** 2 / (a**2 / first.freedom + b**2 / second.freedom)
    return Spread(np.sqrt(a + b), np.where(a + b > 0, freedom, 1.0))


@dataclass(frozen=True)
class Correlation:
    """r and its interval; nan where there is none."""

    r: float
    low: float
    high: float


def pearson(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"], level: float) -> Correlation:
    """With the interval of Fisher's z (1921), of standard error 1 / sqrt(n - 3)."""
    return _correlation(x, y, level, 1.0)


def spearman(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"], level: float) -> Correlation:
    """Of ranks, ties sharing theirs; z has the variance 1.06 / (n - 3) (Fieller, Hartley and Pearson, 1957)."""
    return _correlation(rankdata(x), rankdata(y), level, 1.06)


def _correlation(x: np.ndarray, y: np.ndarray, level: float, factor: float) -> Correlation:
    n = len(x)
    if n < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(np.nan, np.nan, np.nan)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if n < LEAST_RUNS:
        return Correlation(r, np.nan, np.nan)
    with np.errstate(divide="ignore"):
        z, reach = np.arctanh(r), norm.ppf((1 + level) / 2) * np.sqrt(factor / (n - 3))
    return Correlation(r, float(np.tanh(z - reach)), float(np.tanh(z + reach)))
