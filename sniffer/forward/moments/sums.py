"""Moments on the model's device: of stretches of positions first, then of all that belongs together.

Stretches are gone through in chunks that stay in the processor's cache, in float32, about the vector in the middle of
each: so sums of squares keep their digits where a mean is large beside the spread. Short ones that follow one another
are a chunk together, for each step costs time whatever it is of. From there on all is float64. Chunks are counted from
a document's own stretches, so what a document gives does not depend on what it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from torch import Tensor

SHORT, MANY = 256, 16
"""Positions, and stretches, that are a chunk together at most."""

CHUNK = {"cpu": 9 * 64 * SHORT}
"""Values of a long stretch at a time, by device; others have CHUNK_ELSEWHERE, for each step there costs a launch."""

CHUNK_ELSEWHERE = 16 * CHUNK["cpu"]

Pairs = tuple[slice, slice] | None
"""The first and the second of the values that RoPE turns together."""


@dataclass(frozen=True)
class Span:
    """Stretches of `sizes` positions, one after the other from `start` on: several short ones, or one of any size."""

    start: int
    sizes: tuple[int, ...]
    _tables: dict[tuple[torch.device, torch.dtype], Tables] = field(default_factory=dict, compare=False, repr=False)

    @property
    def end(self) -> int:
        return self.start + sum(self.sizes)

    def tables(self, states: Tensor) -> Tables:
        """On the device of some states, and of their type; made once."""
        wanted = states.device, _wide(states)
        if wanted not in self._tables:
            self._tables[wanted] = Tables.of(self.sizes, *wanted)
        return self._tables[wanted]


@dataclass(frozen=True)
class Tables:
    """How stretches lie in their span: the position in the middle of each, and whether each position is of each."""

    middles: Int64[Tensor, " stretches"]
    stretch: Int64[Tensor, " n"]
    belongs: Float[Tensor, "stretches n"]
    n: Float64[Tensor, "stretches 1 1"]

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tables:
        starts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
        middles = torch.tensor([start + size // 2 for start, size in zip(starts, sizes, strict=True)])
        n = torch.tensor(sizes)
        stretch = torch.arange(len(sizes)).repeat_interleave(n)
        belongs = (torch.arange(len(sizes))[:, None] == stretch).to(dtype)
        return cls(middles.to(device), stretch.to(device), belongs.to(device), n.double()[:, None, None].to(device))


@dataclass
class Piece:
    """Sums of the stretches of a span in several documents: `products` (or squares, or None) and `drift` about `shift`.

    `lengths` are sums of the vectors' lengths, then of their rotary pairs'.
    """

    shift: Float[Tensor, "documents heads stretches dim"]
    drift: Float[Tensor, "documents heads stretches dim"]
    products: Float[Tensor, "stretches documents heads ..."] | None
    minimum: Float[Tensor, "documents heads stretches dim"]
    maximum: Float[Tensor, "documents heads stretches dim"]
    lengths: Float64[Tensor, "documents heads stretches one_and_pairs"]


def piece_of(states: Shaped[Tensor, "documents heads n dim"], span: Span, second: str, pairs: Pairs = None) -> Piece:
    """Sums of the stretches of a span.

    Args:
        states: at the positions of the span.
        second: one of sniffer.types.SECONDS.
        pairs: where the values are that RoPE turns together.
    """
    return _short(states, span, second, pairs) if len(span.sizes) > 1 else _long(states, second, pairs)


def _wide(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _short(states: Tensor, span: Span, second: str, pairs: Pairs) -> Piece:
    tables, values = span.tables(states), states.to(_wide(states))
    shift = values.index_select(2, tables.middles)
    about = values - shift.index_select(2, tables.stretch)
    products: Tensor | None = None

    def added(one: Tensor) -> Tensor:
        return torch.matmul(tables.belongs, one)

    if second == "diagonal":
        products = added(about * about).movedim(2, 0)
    elif second == "full":
        documents, heads, _, dim = values.shape
        products = values.new_empty(len(span.sizes), documents, heads, dim, dim)
        for place, one in enumerate(about.split(span.sizes, dim=2)):
            torch.matmul(one.transpose(2, 3), one, out=products[place])
    stretches = values.split(span.sizes, dim=2)
    return Piece(
        shift,
        added(about),
        products,
        torch.stack([one.amin(2) for one in stretches], 2),
        torch.stack([one.amax(2) for one in stretches], 2),
        _lengths(values, pairs, added),
    )


def _long(states: Tensor, second: str, pairs: Pairs) -> Piece:
    _, heads, n, dim = states.shape
    chunk = max(SHORT, CHUNK.get(states.device.type, CHUNK_ELSEWHERE) // (heads * dim))
    shift = states[:, :, n // 2 : n // 2 + 1].to(_wide(states))
    room = torch.empty_like(states[:, :, :chunk], dtype=shift.dtype)
    found: Piece | None = None
    for some in states.split(chunk, dim=2):
        values = some.to(shift.dtype)
        about = torch.sub(values, shift, out=room[:, :, : some.shape[2]])
        piece = Piece(
            shift,
            about.sum(2, keepdim=True).double(),
            _products(about, second, None if found is None else found.products),
            values.amin(2, keepdim=True),
            values.amax(2, keepdim=True),
            _lengths(values, pairs, lambda one: one.sum(2, keepdim=True)),
        )
        found = piece if found is None else _followed(found, piece)
    assert found is not None
    return found


def _followed(one: Piece, other: Piece) -> Piece:
    """The next chunk of the same stretch, whose products hold this one's already."""
    return Piece(
        one.shift,
        one.drift + other.drift,
        other.products,
        torch.minimum(one.minimum, other.minimum),
        torch.maximum(one.maximum, other.maximum),
        one.lengths + other.lengths,
    )


def _products(about: Tensor, second: str, so_far: Tensor | None) -> Tensor | None:
    if second == "none":
        return None
    if second == "diagonal":
        squares = (about * about).sum(2).double().unsqueeze(0)
        return squares if so_far is None else so_far + squares
    flat = about.flatten(0, 1)
    if so_far is None:
        return torch.bmm(flat.transpose(1, 2), flat).unflatten(0, about.shape[:2]).unsqueeze(0)
    so_far.flatten(0, 2).baddbmm_(flat.transpose(1, 2), flat)
    return so_far


def _lengths(
    values: Tensor, pairs: Pairs, added: Callable[[Tensor], Tensor]
) -> Float64[Tensor, "documents heads stretches one_and_pairs"]:
    """Lengths, and those of pairs, `added` up over the positions (dimension 2) of each stretch."""
    if pairs is None:
        return added(torch.linalg.vector_norm(values, dim=3, keepdim=True)).double()
    first, second = values[..., pairs[0]], values[..., pairs[1]]
    squares = (first * first).addcmul_(second, second)
    if 2 * squares.shape[3] == values.shape[3]:
        lengths = squares.sum(3, keepdim=True).sqrt_()
    else:
        lengths = torch.linalg.vector_norm(values, dim=3, keepdim=True)
    found = added(lengths), added(squares.sqrt_())
    return torch.cat(found, dim=-1).double()


@dataclass
class Sums:
    """Moments of all that belongs together, all heads: sums about the mean in `second`, as in `Piece.products`."""

    n: int
    mean: Float64[Tensor, "heads dim"]
    second: Float64[Tensor, "heads ..."] | None
    minimum: Float32[Tensor, "heads dim"]
    maximum: Float32[Tensor, "heads dim"]
    lengths: Float64[Tensor, "heads one_and_pairs"]

    def add(self, other: Sums) -> None:
        """Takes another set of vectors in."""
        n = self.n + other.n
        apart = other.mean - self.mean
        if self.second is not None and other.second is not None:
            self.second += other.second
            _add_products(self.second, apart, self.n * other.n / n)
        self.mean += apart * (other.n / n)
        self.n = n
        torch.minimum(self.minimum, other.minimum, out=self.minimum)
        torch.maximum(self.maximum, other.maximum, out=self.maximum)
        self.lengths += other.lengths

    def tensors(self) -> Sequence[Tensor]:
        return [self.mean, *([] if self.second is None else [self.second]), self.minimum, self.maximum, self.lengths]


class Stack:
    """Sums of each stretch of some spans, over several documents; heads are put in beside each other.

    Args:
        states: the documents, all heads.
    """

    def __init__(
        self,
        states: Shaped[Tensor, "documents heads n dim"],
        spans: Sequence[Span],
        second: str,
        pairs: Pairs = None,
    ) -> None:
        documents, heads, _, dim = states.shape
        sizes = [size for span in spans for size in span.sizes]
        shape = len(sizes), heads

        def empty(*more: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.empty(*shape, *more, dtype=dtype, device=states.device)

        self._n, self._sizes = [documents * size for size in sizes], _cat([span.tables(states).n for span in spans], 0)
        self._mean, self._lengths = empty(dim), empty(1 if pairs is None else 1 + _count(pairs[0], dim))
        self._minimum, self._maximum = empty(dim, dtype=torch.float32), empty(dim, dtype=torch.float32)
        self._second = None if second == "none" else empty(dim) if second == "diagonal" else empty(dim, dim)

    def put(self, heads: slice, pieces: Sequence[Piece]) -> None:
        """Takes some of the heads: a piece of each span."""
        n, drift = self._sizes, _stretches([piece.drift for piece in pieces]).double()
        means = _stretches([piece.shift for piece in pieces]) + drift / n.unsqueeze(3)
        self._mean[:, heads] = mean = _over_documents(means, Tensor.mean)
        minima, maxima, lengths = zip(*((piece.minimum, piece.maximum, piece.lengths) for piece in pieces), strict=True)
        self._minimum[:, heads] = _over_documents(_stretches(minima), Tensor.amin)
        self._maximum[:, heads] = _over_documents(_stretches(maxima), Tensor.amax)
        self._lengths[:, heads] = _over_documents(_stretches(lengths), Tensor.sum)
        if self._second is None:
            return
        second, place = self._second[:, heads], 0
        for products in (piece.products for piece in pieces if piece.products is not None):
            some = second[place : place + len(products)]
            some.copy_(_over_documents(products, lambda one, dim: one.sum(dim, dtype=torch.float64)))
            place += len(products)
        # About each document's mean instead of its shift, then about the mean of all.
        for document in range(drift.shape[1]):
            _add_products(second, drift[:, document], -1 / n)
        if drift.shape[1] > 1:
            for document in range(drift.shape[1]):
                _add_products(second, means[:, document] - mean, n)

    def __getitem__(self, place: int) -> Sums:
        second = None if self._second is None else self._second[place]
        others = (one[place] for one in (self._minimum, self._maximum, self._lengths))
        return Sums(self._n[place], self._mean[place], second, *others)


def _cat(values: Sequence[Tensor], dim: int) -> Tensor:
    """A single one is not copied, for even that costs time."""
    return values[0] if len(values) == 1 else torch.cat(list(values), dim)


def _stretches(values: Sequence[Shaped[Tensor, "documents heads stretches n"]]) -> Tensor:
    """(stretches, documents, heads, n), of all spans."""
    return _cat(values, 2).movedim(2, 0)


def _count(places: slice, dim: int) -> int:
    return len(range(*places.indices(dim)))


def _over_documents(values: Shaped[Tensor, "stretches documents ..."], taken: Callable[..., Tensor]) -> Tensor:
    """Of a single document nothing is taken, as in `_cat`."""
    return values[:, 0] if values.shape[1] == 1 else taken(values, 1)


def _add_products(second: Tensor, values: Float64[Tensor, "... dim"], weight: Tensor | float) -> None:
    """Adds `weight` times products, or squares, of values to what there is of them."""
    weighted = values * weight
    if second.ndim == values.ndim:
        second.addcmul_(values, weighted)
    else:
        second.addcmul_(values.unsqueeze(-1), weighted.unsqueeze(-2))
