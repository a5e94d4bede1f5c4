"""Moments on the model's device: of a stretch of positions first, then of all that belongs together.

A stretch is gone through in chunks that stay in the processor's cache, in float32, about the vector in its middle: so
sums of squares keep their digits where a mean is large beside the spread. From there on all is float64. Chunks are
counted from a document's own stretch, so what a document gives does not depend on what it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Float64, Shaped
from torch import Tensor

CHUNK = {"cpu": 256}
"""Positions at a time, by device; others have CHUNK_ELSEWHERE, for each step there costs a launch or more."""

CHUNK_ELSEWHERE = 4096

Pairs = tuple[slice, slice] | None
"""The first and the second of the values that RoPE turns together."""


@dataclass
class Stretch:
    """Moments of the same stretch of several documents, which have as many positions each.

    `products` and `drift` are sums about `shift`: of products (or squares, or None), and of the values themselves.
    `lengths` are sums of the vectors' lengths, then of their rotary pairs'.
    """

    n: int
    shift: Float64[Tensor, "documents heads dim"]
    drift: Float64[Tensor, "documents heads dim"]
    products: Shaped[Tensor, "documents heads ..."] | None
    minimum: Float32[Tensor, "documents heads dim"]
    maximum: Float32[Tensor, "documents heads dim"]
    lengths: Float64[Tensor, "documents heads one_and_pairs"]

    @classmethod
    def of(cls, states: Shaped[Tensor, "documents heads n dim"], second: str, pairs: Pairs = None) -> Stretch:
        """Args: second: one of sniffer.types.SECONDS; pairs: where the values are that RoPE turns together."""
        chunk = CHUNK.get(states.device.type, CHUNK_ELSEWHERE)
        wide = torch.promote_types(states.dtype, torch.float32)
        middle = states.shape[2] // 2
        shift = states[:, :, middle : middle + 1].to(wide)
        found: Stretch | None = None
        for piece in states.split(chunk, dim=2):
            values = piece.to(wide)
            about = values - shift
            one = cls(
                piece.shape[2],
                shift.squeeze(2).double(),
                about.sum(2).double(),
                _products(about, second, None if found is None else found.products),
                values.amin(2).float(),
                values.amax(2).float(),
                _lengths(values, pairs),
            )
            found = one if found is None else found.followed_by(one)
        assert found is not None
        return found

    def followed_by(self, other: Stretch) -> Stretch:
        """The next chunk, whose products hold this one's already."""
        return Stretch(
            self.n + other.n,
            self.shift,
            self.drift + other.drift,
            other.products,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
            self.lengths + other.lengths,
        )


def _products(about: Tensor, second: str, so_far: Tensor | None) -> Tensor | None:
    if second == "none":
        return None
    if second == "diagonal":
        squares = (about * about).sum(2).double()
        return squares if so_far is None else so_far + squares
    flat = about.flatten(0, 1)
    if so_far is None:
        return torch.bmm(flat.transpose(1, 2), flat).unflatten(0, about.shape[:2])
    so_far.flatten(0, 1).baddbmm_(flat.transpose(1, 2), flat)
    return so_far


def _lengths(values: Tensor, pairs: Pairs) -> Float64[Tensor, "documents heads one_and_pairs"]:
    squares = values * values
    found = squares.sum(3).sqrt_().sum(2).unsqueeze(-1)
    if pairs is not None:
        paired = squares[..., pairs[0]].add_(squares[..., pairs[1]])
        found = torch.cat([found, paired.sqrt_().sum(2)], dim=-1)
    return found.double()


@dataclass
class Sums:
    """Moments of all that belongs together, all heads: sums about the mean in `second`, as in `Stretch.products`."""

    n: int
    mean: Float64[Tensor, "heads dim"]
    second: Float64[Tensor, "heads ..."] | None
    minimum: Float32[Tensor, "heads dim"]
    maximum: Float32[Tensor, "heads dim"]
    lengths: Float64[Tensor, "heads one_and_pairs"]

    @classmethod
    def of(cls, stretch: Stretch) -> Sums:
        """The documents of a stretch together."""
        documents = len(stretch.shift)
        second = None if stretch.products is None else stretch.products.sum(0, dtype=torch.float64)
        means = stretch.shift + stretch.drift / stretch.n
        mean = means.mean(0)
        if second is not None:
            # About each document's mean instead of its shift, then about the mean of all.
            _add_products(second, stretch.drift, -1 / stretch.n)
            if documents > 1:
                _add_products(second, means - mean, stretch.n)
        return cls(
            documents * stretch.n,
            mean,
            second,
            stretch.minimum.amin(0),
            stretch.maximum.amax(0),
            stretch.lengths.sum(0),
        )

    @classmethod
    def of_heads(cls, pieces: Sequence[Sums]) -> Sums:
        """Those of some heads, then those of others, of the same vectors otherwise."""
        if len(pieces) == 1:
            return pieces[0]
        seconds = [one.second for one in pieces if one.second is not None]
        names = ("minimum", "maximum", "lengths")
        others = (torch.cat([getattr(one, name) for one in pieces]) for name in names)
        mean = torch.cat([one.mean for one in pieces])
        return cls(pieces[0].n, mean, torch.cat(seconds) if seconds else None, *others)

    def add(self, other: Sums) -> None:
        """Takes another set of vectors in."""
        n = self.n + other.n
        apart = other.mean - self.mean
        if self.second is not None and other.second is not None:
            self.second += other.second
            _add_products(self.second, apart.unsqueeze(0), self.n * other.n / n)
        self.mean += apart * (other.n / n)
        self.n = n
        torch.minimum(self.minimum, other.minimum, out=self.minimum)
        torch.maximum(self.maximum, other.maximum, out=self.maximum)
        self.lengths += other.lengths

    def tensors(self) -> Sequence[Tensor]:
        return [self.mean, *([] if self.second is None else [self.second]), self.minimum, self.maximum, self.lengths]


def _add_products(second: Tensor, values: Float64[Tensor, "several heads dim"], weight: float) -> None:
    """Adds `weight` times the sum of products, or squares, of some values to what there is of them."""
    if second.ndim == values.ndim - 1:
        second += weight * (values * values).sum(0)
    else:
        by_head = values.transpose(0, 1)
        second.baddbmm_(by_head.transpose(1, 2), by_head, alpha=weight)
