"""How far heads keep their numbers from text to text, by the usual coefficients."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from scipy.stats import rankdata

from ..common.moments import ratio

Values = Float64[np.ndarray, "heads texts"]


def agreement(
    values: Values, times: Float64[np.ndarray, "draws heads"] | None = None
) -> tuple[Float64[np.ndarray, " draws"], Float64[np.ndarray, " draws"]]:
    """Absolute agreement and consistency of single texts, each for every draw of heads.

    By two-way analysis of variance, heads by texts (McGraw and Wong, 1996, ICC(A,1) and ICC(C,1)): the share of the
    variance between heads in all of it, and in what is left when each text may be higher or lower as a whole.
    1: a head's number is the same in every text. `times`: how often each draw counts each head; all once if None.
    """
    weight = np.ones((1, len(values))) if times is None else times
    n, k = weight.sum(1), values.shape[1]
    row = values.mean(1)
    column = weight @ values / n[:, None]
    grand = column.mean(1)
    of_rows = k * (weight @ row**2 - n * grand**2) / (n - 1)
    of_columns = n * ((column - grand[:, None]) ** 2).sum(1) / (k - 1)
    whole = weight @ (values**2).sum(1) - n * k * grand**2
    left = (whole - (n - 1) * of_rows - (k - 1) * of_columns) / ((n - 1) * (k - 1))
    # Rounding leaves something of what does not vary.
    left = np.where(left < 1e-12 * np.maximum(of_rows, of_columns), 0.0, left)
    absolute = of_rows + (k - 1) * left + k / n * (of_columns - left)
    return (
        np.where(absolute > 0, ratio(of_rows - left, absolute), np.nan),
        np.where(of_rows + (k - 1) * left > 0, ratio(of_rows - left, of_rows + (k - 1) * left), np.nan),
    )


def concordance(x: Float64[np.ndarray, " heads"], y: Float64[np.ndarray, " heads"]) -> float:
    """Lin's coefficient (1989): 2 cov / (var + var + (difference of means)^2); 1 where y = x."""
    covariance = np.cov(x, y, ddof=0)
    below = covariance[0, 0] + covariance[1, 1] + (x.mean() - y.mean()) ** 2
    return float(2 * covariance[0, 1] / below) if below > 0 else float("nan")


def rank_correlation(x: Float64[np.ndarray, " heads"], y: Float64[np.ndarray, " heads"]) -> float:
    """Spearman's: whether heads keep their order; nan where one does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def spread(values: Values) -> Float64[np.ndarray, " heads"]:
    """Of each head its standard deviation over texts, in standard deviations of heads (of their means)."""
    return np.asarray(ratio(values.std(1, ddof=1), np.full(len(values), values.mean(1).std())))
