"""Moments: sums over all positions of documents, by head and bucket, and how they merge.

Every quantity here merges exactly: those of two disjoint sets of vectors give those of their union (counts and sums by
adding, extremes by comparing, sums about the mean by the formula of Chan, Golub and LeVeque, 1983). So batches,
workers, shards and resumed runs can each have their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64

SECONDS = ("none", "diagonal", "full")
"""What is summed of products of values: nothing, squares, or all products of two values of a vector."""

MOMENTS = (-1, "moments")
"""What stands for them where documents are told by (layer, kind): those whose vectors have been counted."""


@dataclass(frozen=True)
class MomentsLayout:
    """Which moments a run has.

    `second` is one of SECONDS. The positions of each of `sections` are counted apart, those of all others together.
    """

    kinds: tuple[str, ...]
    second: str
    sections: tuple[str, ...] = ()

    def seconds(self, dim: int) -> int:
        """Numbers of second moments: of a symmetric matrix its upper triangle, row by row."""
        return {"none": 0, "diagonal": dim, "full": dim * (dim + 1) // 2}[self.second]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "kinds": list(self.kinds), "sections": list(self.sections)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> MomentsLayout:
        return cls(tuple(values["kinds"]), values["second"], tuple(values.get("sections", ())))


@dataclass(frozen=True, eq=False)
class Moments:
    """Of all vectors of one head and kind, or of those in some buckets or sections, at every position.

    Attributes:
        n: how many vectors.
        mean: of each value.
        minimum, maximum: of each value, exact.
        norm: mean Euclidean length of a vector.
        pairs: mean length of each pair of values that RoPE turns, as the layer pairs them (`run.rope(layer)`); the
            length of the pair's mean over it is its concentration. None for v, and where RoPE is not known.
        squares: sum of squares about the mean, of each value; None where no second moments were kept.
        products: sum of products of two values about their means; None where just the diagonal was kept.
    """

    n: int
    mean: Float64[np.ndarray, " dim"]
    minimum: Float64[np.ndarray, " dim"]
    maximum: Float64[np.ndarray, " dim"]
    norm: float
    pairs: Float64[np.ndarray, " pairs"] | None
    squares: Float64[np.ndarray, " dim"] | None = None
    products: Float64[np.ndarray, "dim dim"] | None = None

    @property
    def absmax(self) -> Float64[np.ndarray, " dim"]:
        """The largest absolute value of each."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def std(self) -> Float64[np.ndarray, " dim"] | None:
        """Standard deviation over the population, of each value."""
        return None if self.squares is None else np.sqrt(self.squares / self.n)

    @property
    def covariance(self) -> Float64[np.ndarray, "dim dim"] | None:
        """Over the population (divided by n); None where it was not kept."""
        return None if self.products is None else self.products / self.n

    @property
    def second(self) -> Float64[np.ndarray, "dim dim"] | None:
        """The mean of x x^T, about zero; None where it was not kept."""
        return None if self.products is None else self.products / self.n + np.outer(self.mean, self.mean)

    @classmethod
    def of_sums(cls, layout: MomentsLayout, n: int, values: Mapping[str, np.ndarray]) -> Moments:
        """From sums over `n` vectors of one head, by name as `MomentRows` has them."""
        squares = products = None
        if layout.second == "diagonal":
            squares = values["second"]
        elif layout.second == "full":
            dim = len(values["mean"])
            products = np.empty((dim, dim))
            upper = np.triu_indices(dim)
            products[upper] = products.T[upper] = values["second"]
            squares = products.diagonal().copy()
        lengths = values["lengths"]
        pairs = lengths[1:] / n if len(lengths) > 1 else None
        extremes = values["minimum"], values["maximum"]
        return cls(n, values["mean"], *extremes, float(lengths[0]) / n, pairs, squares, products)

    @classmethod
    def merged(cls, pieces: Iterable[Moments]) -> Moments:
        """Of disjoint sets of vectors, one at least, all of them together."""
        first, *others = pieces
        for other in others:
            first = first._with(other)
        return first

    def _with(self, other: Moments) -> Moments:
        n = self.n + other.n
        mine, theirs = self.n / n, other.n / n
        apart = other.mean - self.mean
        weight = self.n * theirs

        def mean(one: Any, two: Any) -> Any:
            return None if one is None or two is None else mine * one + theirs * two

        def about(one: Any, two: Any, between: Any) -> Any:
            return None if one is None or two is None else one + two + weight * between

        return Moments(
            n,
            self.mean + theirs * apart,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            float(mean(self.norm, other.norm)),
            mean(self.pairs, other.pairs),
            about(self.squares, other.squares, apart**2),
            about(self.products, other.products, np.outer(apart, apart)),
        )


@dataclass(frozen=True, eq=False)
class MomentRows:
    """What a file has of one (layer, kind), bucket and section: a row for each head.

    `second` are sums about the mean as `MomentsLayout.seconds` counts them; `lengths` sums over vectors of their length
    and of that of their rotary pairs.
    """

    layer: int
    kind: str
    heads: tuple[int, ...]
    bucket: int
    section: str
    n: int
    mean: Float64[np.ndarray, "heads dim"]
    second: Float64[np.ndarray, "heads seconds"]
    minimum: Float32[np.ndarray, "heads dim"]
    maximum: Float32[np.ndarray, "heads dim"]
    lengths: Float64[np.ndarray, "heads one_and_pairs"]

    def of(self, head: int, layout: MomentsLayout) -> Moments:
        """Those of one head."""
        names, place = ("mean", "second", "minimum", "maximum", "lengths"), self.heads.index(head)
        values = {name: np.asarray(getattr(self, name)[place], dtype=np.float64) for name in names}
        return Moments.of_sums(layout, self.n, values)
