"""Uniform quantisation of keys, and the error that it leaves.

Each group of numbers keeps its smallest and largest value and rounds the rest to 2^bits even levels between
them. What makes the difference is what a group is. Keys have channels (dimensions) that are large at every
token: per token, such a channel sets the scale for all the others; per channel, only for itself. RoPE mixes
channels in pairs, which is why keys before RoPE take per-channel quantisation better.

Sources: KIVI, Liu and others, 2024 (arXiv 2402.02750): asymmetric min-max groups, keys per channel; KVQuant, Hooper
and others, 2024 (arXiv 2401.18079): keys before RoPE, per channel.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float64

from ..common.moments import ratio

PER = ("channel", "token")


def quantised(x: Float[np.ndarray, "heads n dim"], bits: int, per: str, group: int) -> Float[np.ndarray, "heads n dim"]:
    """x as it comes back from quantisation.

    Args:
        per: "channel": a scale for `group` consecutive rows of one dimension. "token": for `group` consecutive
            dimensions of one row. The last group may be smaller.
    """
    axis = {"channel": 1, "token": 2}[per]
    moved = np.moveaxis(x, axis, -1)
    length = moved.shape[-1]
    padding = -length % group
    # Repeating the last number leaves the smallest and largest of its group as they are.
    padded = np.pad(moved, [(0, 0), (0, 0), (0, padding)], mode="edge")
    grouped = padded.reshape(*moved.shape[:-1], -1, group)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    level = np.rint(np.divide(grouped - low, step, out=np.zeros_like(grouped), where=step > 0))
    restored = (low + level * step).reshape(padded.shape)[..., :length]
    return np.moveaxis(restored, -1, axis)


def relative_error(
    x: Float[np.ndarray, "heads n dim"], restored: Float[np.ndarray, "heads n dim"], weights: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " heads"]:
    """|x - restored| / |x| in the Frobenius norm, rows weighted."""
    lost, whole = (np.einsum("n,hnd,hnd->h", weights, part, part) for part in (x - restored, x))
    return np.sqrt(ratio(lost, whole))


def channel_size(
    x: Float[np.ndarray, "heads n dim"], weights: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, "heads dim"]:
    """Root mean square of each channel over that of the head's median channel."""
    return over_median(np.sqrt(np.einsum("n,hnd->hd", weights / weights.sum(), x.astype(np.float64) ** 2)))


def over_median(size: Float64[np.ndarray, "heads dim"]) -> Float64[np.ndarray, "heads dim"]:
    """Sizes of channels over that of the head's median channel."""
    return ratio(size, np.median(size, axis=1, keepdims=True))


def outliers(size: Float64[np.ndarray, "heads dim"], times: float) -> Bool[np.ndarray, "heads dim"]:
    """Channels that are many times as large as the median one."""
    return size >= times
