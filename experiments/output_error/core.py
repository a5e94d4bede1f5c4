"""A head's output with all of its keys and values, and with some that were changed or dropped.

    p_j = exp(l_j) / (sum over keys of exp(l) + exp(sink))          o = sum over keys of p_j v_j

Dropped keys leave the sum: what is left is divided by less. Which are kept:

    recent    the first `sinks` positions and the latest keys (StreamingLLM, Xiao and others, 2023, arXiv 2309.17453)
    heavy     the latest keys and, as many, those with the largest sum of weights over the queries before (H2O, Zhang
              and others, 2023, arXiv 2306.14048). H2O drops a key for good; here each query chooses among all it sees.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from ..common.moments import ratio


def weights(
    logits: Float64[np.ndarray, "heads queries keys"], sinks: Float64[np.ndarray, " heads"] | None
) -> np.ndarray:
    """Of each key for each query; logits of keys that are not seen are minus infinity, sinks take their share."""
    most = logits.max(-1, keepdims=True)
    beside = None if sinks is None else sinks[:, None, None]
    most = most if beside is None else np.maximum(most, beside)
    powers = np.exp(logits - most)
    total = powers.sum(-1, keepdims=True)
    return np.asarray(powers / (total if beside is None else total + np.exp(beside - most)))


def relative_error(
    found: Float64[np.ndarray, "heads queries dim"], exact: Float64[np.ndarray, "heads queries dim"]
) -> Float64[np.ndarray, "heads queries"]:
    """|found - exact| / |exact|."""
    return ratio(np.linalg.norm(found - exact, axis=-1), np.linalg.norm(exact, axis=-1))


def logit_error(
    found: Float64[np.ndarray, "heads queries keys"], exact: Float64[np.ndarray, "heads queries keys"]
) -> Float64[np.ndarray, "heads queries"]:
    """Root mean square over the keys that a query sees."""
    seen = np.isfinite(exact)
    off = np.subtract(found, exact, out=np.zeros_like(exact), where=seen)
    return np.sqrt((off**2).sum(-1) / seen.sum(-1))


def budget(seen: Bool[np.ndarray, "queries keys"], share: float) -> Int[np.ndarray, " queries"]:
    """How many keys of those that a query sees are kept."""
    return np.ceil(share * seen.sum(1)).astype(np.int64)


def latest(
    seen: Bool[np.ndarray, "queries keys"], count: Int[np.ndarray, " queries"]
) -> Bool[np.ndarray, "queries keys"]:
    """The last keys that each query sees, its own among them at least."""
    age = seen[:, ::-1].cumsum(1)[:, ::-1]
    return np.asarray(seen & (age <= np.maximum(1, count)[:, None]))


def recent(seen: Bool[np.ndarray, "queries keys"], share: float, sinks: int) -> Bool[np.ndarray, "queries keys"]:
    """Which keys are kept where the first positions and the latest are."""
    first = seen & (np.arange(seen.shape[1]) < sinks)
    return first | latest(seen, budget(seen, share) - first.sum(1))


def heavy(
    seen: Bool[np.ndarray, "queries keys"], share: float, sums: Float64[np.ndarray, "queries keys"]
) -> Bool[np.ndarray, "queries keys"]:
    """Which keys are kept where half are the latest, and half those of the largest sums; of equal ones the first."""
    total = budget(seen, share)
    kept = latest(seen, total - total // 2)
    for row, room in enumerate(total - kept.sum(1)):
        others = np.flatnonzero(seen[row] & ~kept[row])
        kept[row, others[np.argsort(-sums[row, others], kind="stable")[: max(0, room)]]] = True
    return kept


def sums_before(
    at: Int[np.ndarray, " queries"],
    history: Float64[np.ndarray, "heads earlier keys"],
    places: Int[np.ndarray, " earlier"],
    counts: Float64[np.ndarray, " earlier"],
) -> Float64[np.ndarray, "heads queries keys"]:
    """Sums of weights over the queries at `places` before each one at `at`; `counts` says for how many each stands."""
    running = np.cumsum(history * counts[:, None], axis=1)
    running = np.concatenate([np.zeros_like(running[:, :1]), running], axis=1)
    return np.asarray(running[:, np.searchsorted(places, at)])


def weighted_median(
    values: Float[np.ndarray, "heads n"], counts: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " heads"]:
    """The least value that half of the weight does not exceed."""
    order = np.argsort(values, axis=1)
    reached = counts[order].cumsum(1) >= 0.5 * counts.sum() * (1 - 1e-12)
    place = np.take_along_axis(order, reached.argmax(1)[:, None], axis=1)
    return np.take_along_axis(values, place, axis=1)[:, 0].astype(np.float64)
