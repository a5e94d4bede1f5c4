"""Vectors with numbers that are not finite: counted where they are written, and again where they are verified.

A model in float16 overflows, a broken checkpoint holds NaN. What attention received is kept as it was, to the
bit; the counts say that it is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True)
class NotFinite:
    """How many vectors hold a NaN, and how many an infinity of either sign; one with both counts for both."""

    nan: int = 0
    infinity: int = 0

    def __add__(self, other: NotFinite) -> NotFinite:
        return NotFinite(self.nan + other.nan, self.infinity + other.infinity)

    def __bool__(self) -> bool:
        return bool(self.nan or self.infinity)

    def __str__(self) -> str:
        told = [f"{count:,} with {name}" for name, count in (("NaN", self.nan), ("infinity", self.infinity)) if count]
        return ", ".join(told) or "none"


NONE = NotFinite()


def count_not_finite(vectors: Float32[np.ndarray, "rows dim"]) -> NotFinite:
    """Of some vectors. Nearly always all are finite, which one look at each number tells."""
    if np.isfinite(vectors).all():
        return NONE
    return NotFinite(int(np.isnan(vectors).any(axis=1).sum()), int(np.isinf(vectors).any(axis=1).sum()))
