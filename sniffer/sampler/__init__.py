"""Samplers: which positions of a document are kept, as a law rather than a generator.

A sampler is two pure functions of the position: the bucket it falls in and the probability that it is
kept. The decision itself belongs to the position: a counter-based 64-bit hash of (seed, example, layer,
kind, position) is compared with the probability. It therefore does not depend on batch size, padding,
truncation, sharding, device or library version; rates nest (what is kept at base_rate 1 is kept at 2);
and every row's decision can be recomputed from the manifest.

To write one, subclass Sampler, name it in `sampler._target_`, and give the two methods. A probability
must be the same throughout a bucket, since the bucket is what a row remembers of its rate. Both must answer for each
position alone, whatever else is asked with it; law.py checks what a sampler says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int32, Int64

from sniffer.errors import ConfigError
from sniffer.sampler.base import SEED_PARTS, Sampler, describe
from sniffer.sampler.per_side import SIDES, PerSide, picker_of
from sniffer.sampler.picker import Picker

__all__ = [
    "FORMULAS",
    "SEED_PARTS",
    "SIDES",
    "All",
    "LogUniform",
    "PerSide",
    "Picker",
    "Sampler",
    "Uniform",
    "describe",
    "picker_of",
]

LARGEST_SIZE = 1 << 62
"""Of a bucket: far beyond any position, and within what arrays of positions can be divided by."""


@dataclass(frozen=True)
class LogUniform(Sampler):
    """Geometric buckets, each with about `base_rate` positions kept, early and late alike.

    bucket(p) = max(log2(min_bucket_size), floor(log2(p + 1)));  P(keep) = min(1, base_rate / 2^bucket).
    """

    formula = "bucket(p) = max(log2(min_bucket_size), floor(log2(p + 1))); P(keep p) = min(1, base_rate / 2^bucket)"

    base_rate: float = 1.0
    min_bucket_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_base_rate(self.base_rate)
        size = self.min_bucket_size
        if not 1 <= size <= LARGEST_SIZE:
            raise ConfigError(f"sampler.min_bucket_size={size} must be a power of two, {_from_to(size)}")
        if size & (size - 1):
            below = 1 << (size.bit_length() - 1)
            raise ConfigError(f"sampler.min_bucket_size={size} is not a power of two: use {below} or {2 * below}")

    def bucket(self, positions: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        # frexp is exact where a float logarithm is not: p + 1 = m * 2^e with 0.5 <= m < 1.
        exponent = np.frexp((positions + 1).astype(np.float64))[1] - 1
        return np.maximum(exponent, self.min_bucket_size.bit_length() - 1).astype(np.int32)

    def probability(self, positions: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        return np.minimum(1.0, np.ldexp(np.float64(self.base_rate), -self.bucket(positions)))


@dataclass(frozen=True)
class Uniform(Sampler):
    """Equal buckets, each with about `base_rate` positions kept.

    bucket(p) = floor(p / bucket_size);  P(keep) = min(1, base_rate / bucket_size).
    """

    formula = "bucket(p) = floor(p / bucket_size); P(keep p) = min(1, base_rate / bucket_size)"

    base_rate: float = 1.0
    bucket_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_base_rate(self.base_rate)
        _check_bucket_size(self.bucket_size)

    def bucket(self, positions: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        return (positions // self.bucket_size).astype(np.int32)

    def probability(self, positions: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        return np.full(len(positions), min(1.0, self.base_rate / self.bucket_size))


@dataclass(frozen=True)
class All(Sampler):
    """Every position; bucket(p) = floor(p / bucket_size)."""

    formula = "bucket(p) = floor(p / bucket_size); every position is kept"

    bucket_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bucket_size(self.bucket_size)

    def bucket(self, positions: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        return (positions // self.bucket_size).astype(np.int32)

    def probability(self, positions: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        return np.ones(len(positions))


FORMULAS = {f"{one.__module__}.{one.__name__}": one.formula for one in (LogUniform, Uniform, All)} | {
    "sniffer.sampler.PerSide": PerSide.formula
}
"""Of our own samplers, by the name that a run knows them by."""


def _check_base_rate(base_rate: float) -> None:
    if not (math.isfinite(base_rate) and base_rate >= 0):
        raise ConfigError(f"sampler.base_rate={base_rate} must be a finite number, 0 or more")


def _check_bucket_size(bucket_size: int) -> None:
    if not 1 <= bucket_size <= LARGEST_SIZE:
        raise ConfigError(f"sampler.bucket_size={bucket_size} must be {_from_to(bucket_size)}")


def _from_to(size: int) -> str:
    return "1 or more" if size < 1 else f"at most {LARGEST_SIZE}"
