"""Fixed 64-bit hashing: the same numbers on every machine, Python and numpy version.

Sampling decisions and row digests both rest on it, so nothing here may ever change its results: doing
so would change which positions old configurations keep. `mix64` is the SplitMix64 finaliser (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of Stafford's
variant 13 as in Vigna's splitmix64.c). Names and texts are hashed with BLAKE2b (RFC 7693).
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from jaxtyping import UInt64

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, odd: SplitMix64's step between two counters."""

MASK64 = (1 << 64) - 1


def mix64(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Scrambles an array of 64-bit values so that neighbours look independent; a bijection with 0 fixed."""
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def mix64_int(value: int) -> int:
    """`mix64` of one Python integer, taken modulo 2^64."""
    value &= MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def key_of(*parts: int | np.integer[Any] | str) -> int:
    """A 64-bit key for a tuple of integers and strings; 1 and "1" differ, ("ab", "c") and ("a", "bc") too."""
    return key_after(begun(), spelled(*parts))


def begun(*parts: int | np.integer[Any] | str) -> blake2b:
    """The beginning of keys that have their first parts in common; `key_after` has the rest."""
    return blake2b(spelled(*parts), digest_size=8)


def key_after(begin: blake2b, rest: bytes) -> int:
    """The key of a beginning and the rest, as `spelled`: `key_of` of all parts together."""
    digest = begin.copy()
    digest.update(rest)
    return int.from_bytes(digest.digest(), "little")


def spelled(*parts: int | np.integer[Any] | str) -> bytes:
    """Parts as bytes, so that no two tuples are spelled alike."""
    marked = [("s", part) if isinstance(part, str) else ("i", str(int(part))) for part in parts]
    encoded = [(mark, text.encode("utf-8", "surrogatepass")) for mark, text in marked]
    return b"".join(f"{mark}{len(text)}:".encode() + text for mark, text in encoded)


def stable_id(text: str) -> int:
    """A 63-bit non-negative integer that stands for a string, so that it fits a signed int64 column."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
