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

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt64

from sniffer.errors import ConfigError, first_line
from sniffer.hashing import GOLDEN, key_of, mix64
from sniffer.sampler.law import NO_LAW, law_of
from sniffer.types import Document, Picks, TokenBatch

SEED_PARTS = ("example", "layer", "kind")
LARGEST_SIZE = 1 << 62
"""Of a bucket: far beyond any position, and within what arrays of positions can be divided by."""
BLOCK = 1 << 14
"""Positions hashed at a time: the working arrays of one block stay in the processor's cache."""


@dataclass(frozen=True)
class Sampler(ABC):
    """What every sampler shares.

    `formula` says the law, for whoever reads a published run. `seed_by`: the parts that seed a draw beside `seed`.
    Without "kind", q and k keep the same positions; without "layer", all layers do.
    """

    formula: ClassVar[str] = ""

    seed_by: list[str] = field(default_factory=lambda: list(SEED_PARTS))

    def __post_init__(self) -> None:
        unknown = [part for part in self.seed_by if part not in SEED_PARTS]
        if unknown or len(set(self.seed_by)) != len(self.seed_by):
            raise ConfigError(
                f"sampler.seed_by={list(self.seed_by)} is not a selection of {list(SEED_PARTS)}, each at most once"
            )

    @abstractmethod
    def bucket(self, positions: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """The bucket each position falls in."""

    @abstractmethod
    def probability(self, positions: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """The probability, in [0, 1], that each position is kept; constant within a bucket."""


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


FORMULAS = {f"{one.__module__}.{one.__name__}": one.formula for one in (LogUniform, Uniform, All)}
"""Of our own samplers, by the name that a run knows them by."""


class Picker:
    """Draws the picks of a sampler, with the sampler's law tabulated once per position.

    Raises:
        ConfigError: here, or when longer documents come, where the sampler has no law (law.py).
    """

    def __init__(self, sampler: Sampler, seed: int) -> None:
        _check_sampler(sampler)
        self.sampler = sampler
        self.seed = seed
        self._law = NO_LAW
        self._tabulate(1 << 10)

    def pick(self, batch: TokenBatch, layer: int, draw: str) -> Picks:
        """The positions of every document in `batch` that the draw (layer, draw) keeps."""
        kept = [self.positions(document, layer, draw) for document in batch.documents]
        rows = np.repeat(np.arange(len(kept), dtype=np.int32), [len(positions) for positions in kept])
        positions = np.concatenate(kept)
        return Picks(rows, positions, self.buckets[positions])

    def positions(self, document: Document, layer: int, draw: str) -> Int32[np.ndarray, " picks"]:
        """The kept positions of one document, ascending."""
        first, end = document.first_position, document.first_position + document.n_tokens
        self._tabulate(end)
        if self.certain_until >= end:
            return np.arange(first, end, dtype=np.int32)
        kept = np.flatnonzero(self._keep(self.key(document, layer, draw), end)).astype(np.int32)
        return kept[kept >= first] if first else kept

    def key(self, document: Document, layer: int, draw: str) -> int:
        """The 64-bit seed of one draw."""
        values: dict[str, int | str] = {"example": document.example_id, "layer": layer, "kind": draw}
        named = [(name, values[name]) for name in SEED_PARTS if name in self.sampler.seed_by]
        return key_of(self.seed, *chain.from_iterable(named))

    def expected(self, n_tokens: Sequence[int]) -> float:
        """The expected number of picks of one draw over documents of these lengths."""
        self._tabulate(max(n_tokens, default=0))
        running = np.concatenate(([0.0], np.cumsum(self.probabilities)))
        return float(running[np.asarray(n_tokens, dtype=np.int64)].sum())

    def probability_by_bucket(self, n_positions: int) -> dict[int, float]:
        """The keep probability of each bucket that the first `n_positions` positions fall in."""
        self._tabulate(n_positions)
        buckets, first = np.unique(self.buckets[:n_positions], return_index=True)
        return {int(b): float(p) for b, p in zip(buckets, self.probabilities[first], strict=True)}

    def span(self, bucket: int) -> tuple[int, int]:
        """The first and last position of a bucket, among the positions that were asked about so far."""
        inside = np.flatnonzero(self.buckets == bucket)
        return int(inside[0]), int(inside[-1])

    def _keep(self, key: int, n: int) -> Bool[np.ndarray, " n"]:
        keep = np.empty(n, dtype=bool)
        for start in range(0, n, BLOCK):
            block = slice(start, min(start + BLOCK, n))
            hashes = mix64(self.base_hashes[block] ^ np.uint64(key))
            np.less_equal(hashes, self.thresholds[block], out=keep[block])
        if self.has_zero:
            keep &= self.probabilities[:n] > 0
        return keep

    def _tabulate(self, n: int) -> None:
        """Extends the tables to `n` positions, in powers of two so that it happens rarely."""
        if n <= len(self._law):
            return
        self._law = law_of(self.sampler, 1 << (n - 1).bit_length(), self._law)
        self.buckets, self.probabilities = self._law.buckets, self._law.probabilities
        positions = np.arange(len(self._law), dtype=np.int64)
        self.thresholds = _thresholds(self.probabilities)
        self.base_hashes = mix64((positions.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
        self.has_zero = bool((self.probabilities == 0).any())
        uncertain = np.flatnonzero(self.probabilities < 1)
        self.certain_until = int(uncertain[0]) if len(uncertain) else len(positions)


def _thresholds(probabilities: Float64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """T with P(h <= T) = probability for a uniform 64-bit h; probability 0 is the caller's case."""
    certain = probabilities >= 1
    scaled = np.ceil(np.ldexp(np.where(certain, 0.5, probabilities), 64))
    below = np.maximum(scaled, 1).astype(np.uint64) - np.uint64(1)
    return np.where(certain, np.uint64(2**64 - 1), below)


def _check_sampler(sampler: Any) -> None:
    name = type(sampler).__name__
    if not isinstance(sampler, Sampler):
        raise ConfigError(f"{name} is no sampler: name a subclass of sniffer.sampler.Sampler, such as LogUniform")
    try:
        json.dumps(describe(sampler))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"sampler {name} has fields that cannot be recorded ({first_line(error)}): use numbers, text and lists of "
            "them as fields, and make all else of them in its methods"
        ) from error


def _check_base_rate(base_rate: float) -> None:
    if not (math.isfinite(base_rate) and base_rate >= 0):
        raise ConfigError(f"sampler.base_rate={base_rate} must be a finite number, 0 or more")


def _check_bucket_size(bucket_size: int) -> None:
    if not 1 <= bucket_size <= LARGEST_SIZE:
        raise ConfigError(f"sampler.bucket_size={bucket_size} must be {_from_to(bucket_size)}")


def _from_to(size: int) -> str:
    return "1 or more" if size < 1 else f"at most {LARGEST_SIZE}"


def describe(sampler: Sampler) -> dict[str, object]:
    """The sampler as plain values: its class and its fields."""
    name = f"{type(sampler).__module__}.{type(sampler).__qualname__}"
    return {"_target_": name, **{f.name: getattr(sampler, f.name) for f in fields(sampler)}}
