"""A digest of a set of rows, whatever their order and however they are split into files.

Two runs captured the same exactly when their digests agree, even if one was interrupted, resumed or cut into
parts at other places. Each row becomes a 64-bit number by multilinear hashing (Lemire and Kaser,
"Strongly universal string hashing is fast", 2014): every 32-bit word times its own odd 64-bit weight,
summed modulo 2^64, then scrambled. A change of any one field therefore always changes the number.
The rows' numbers are summed twice, under two scramblings, and sums do not mind order. This finds faults
and differences; it does not keep out a forger, for which the manifest has each file's SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float32, UInt64

from sniffer.hashing import GOLDEN, MASK64, key_of, mix64, mix64_int
from sniffer.types import NONE, Rows

BLOCK = 1 << 12
"""Rows hashed at a time, so that the widened words stay small."""

N_WORDS = 5
"""32-bit words of a row before its floats."""

SECOND_LANE = np.uint64(key_of("second lane"))


@dataclass(frozen=True)
class Digest:
    """The sums of two 64-bit hashes over a set of rows; digests of disjoint sets add up."""

    first: int = 0
    second: int = 0

    def __add__(self, other: Digest) -> Digest:
        return Digest((self.first + other.first) & MASK64, (self.second + other.second) & MASK64)

    def __str__(self) -> str:
        return f"{self.first:016x}{self.second:016x}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """From the 32 hexadecimal digits that `str` gives."""
        if len(text) != 32:
            raise ValueError(f"a digest has 32 hexadecimal digits, not {text!r}")
        return cls(int(text[:16], 16), int(text[16:], 16))


def combine(digests: Iterable[str]) -> str:
    """The digest of all rows together, from the digests of disjoint sets."""
    return str(sum(map(Digest.parse, digests), Digest()))


def sum_rows(rows: Rows) -> UInt64[np.ndarray, " rows"]:
    """What the columns that all heads share add to each row's number, for `digest_rows`.

    A row of no section counts as it does in a run without sections.
    """
    words = (rows.bucket, rows.position, rows.token_id, rows.example_id & 0xFFFFFFFF, rows.example_id >> 32)
    sums = np.zeros(len(rows), dtype=np.uint64)
    for column, weight in zip(words, _weights(N_WORDS), strict=True):
        sums += column.astype(np.uint64) * weight
    if rows.section is not None:
        numbers = [0 if name == NONE else key_of("section", name) for name in rows.section.known]
        sums += np.array(numbers, dtype=np.uint64)[rows.section.codes]
    return sums


def digest_rows(
    layer: int,
    kind: str,
    head: int,
    sums: UInt64[np.ndarray, " rows"],
    vectors: Float32[np.ndarray, "rows dim"],
) -> Digest:
    """The digest of rows of one (layer, kind, head); `sums` is what `sum_rows` makes of the other columns.

    Floats count by their bits, so that -0.0 is not 0.0 and any NaN equals itself.
    """
    start = np.uint64(key_of("row", layer, kind, head))
    weights = _weights(N_WORDS + vectors.shape[1])[N_WORDS:]
    total = Digest()
    for first in range(0, len(vectors), BLOCK):
        block = slice(first, first + BLOCK)
        floats = np.ascontiguousarray(vectors[block]).view(np.uint32).astype(np.uint64)
        hashes = mix64(np.einsum("ij,j->i", floats, weights) + start + sums[block])
        total += Digest(_sum(hashes), _sum(mix64(hashes ^ SECOND_LANE)))
    return total


@cache
def _weights(n: int) -> UInt64[np.ndarray, " n"]:
    """Fixed odd 64-bit weights: SplitMix64's stream from seed 0, made odd."""
    return np.array([mix64_int(GOLDEN * (word + 1)) | 1 for word in range(n)], dtype=np.uint64)


def _sum(hashes: UInt64[np.ndarray, " rows"]) -> int:
    return int(np.add.reduce(hashes, dtype=np.uint64))
