"""The order rows take on disk, worked out before any of them moves.

Captured rows lie in chunks, in the order in which documents went through the model, heads side by side.
On disk they are sorted by (head, bucket, example_id, position), and by section before bucket in runs that have some,
so that who asks for one finds it in few row groups. All heads of a (layer, kind) share one sorting, so it is worked
out once, as a few *spans*: pieces small enough to pick out and widen at a time, each made of whole row groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int32, Int64

from sniffer.forward.columns import Columns
from sniffer.types import Rows

if TYPE_CHECKING:
    import torch

MIN_ROW_GROUP_BYTES = 512 * 1024
"""Of float32 vectors: a smaller row group is not worth a read of its own."""

MAX_SPAN_BYTES = 8 * 1024 * 1024
"""Of float32 vectors: the largest row group, and what is widened at a time."""


@dataclass(frozen=True)
class Span:
    """Some consecutive rows of the sorted order, the same for every head.

    `rows` places the span in the sorted order; `row_groups` cut it up, counted from its own start.
    `sources` are the rows to take from each chunk, as (chunk, rows in it). What is taken from several
    chunks is then brought into the sorted order by `order`; from one chunk it comes in that order.
    """

    rows: slice
    row_groups: tuple[slice, ...]
    sources: tuple[tuple[int, Int64[np.ndarray, " _"]], ...]
    order: Int64[np.ndarray, " rows"]

    def vectors(self, columns: Columns, place: int) -> Float32[np.ndarray, "rows dim"]:
        """This span's vectors of the head at `place` in `columns.heads`, sorted and widened to float32."""
        n_heads, dim = len(columns.heads), columns.dim
        taken: list[np.ndarray] = []
        for chunk, rows in self.sources:
            by_head = as_array(columns.vectors[chunk]).reshape(-1, dim)
            taken.append(by_head.take(rows * n_heads + place, axis=0))
        if len(taken) > 1:
            taken = [np.concatenate(taken).take(self.order, axis=0)]
        return _widened(taken[0])


def as_array(chunk: torch.Tensor) -> np.ndarray:
    """A chunk without a copy; bfloat16, which NumPy does not have, as its bits.

    In NumPy, since several parts are written at a time, and each of PyTorch's calls would wake all cores for
    a piece of work too small to share.
    """
    import torch

    return chunk.view(torch.uint16).numpy() if chunk.dtype == torch.bfloat16 else chunk.numpy()


def _widened(vectors: np.ndarray) -> Float32[np.ndarray, "rows dim"]:
    """As float32: the bits of a bfloat16 are the upper half of those of the same float32."""
    if vectors.dtype == np.uint16:
        return (vectors.astype(np.uint32) << np.uint32(16)).view(np.float32)
    import torch

    # NumPy would keep the signalling bit of a float16 NaN, which PyTorch clears.
    return torch.from_numpy(vectors).float().numpy()


def spans(columns: Columns, order: Int64[np.ndarray, " rows"]) -> list[Span]:
    """Cuts the sorted rows into spans of whole row groups."""
    row_bytes = 4 * columns.dim
    groups = row_groups(_numbered(columns.rows[order]), row_bytes)
    ends = np.cumsum([len(chunk) for chunk in columns.vectors])
    return [_span(joined, order, ends) for joined in _join(groups, max(1, MAX_SPAN_BYTES // row_bytes))]


def row_groups(sorted_buckets: Int32[np.ndarray, " rows"], row_bytes: int) -> list[slice]:
    """Cuts one head's rows where a bucket begins, if what lies on both sides stays large enough.

    A piece beyond MAX_SPAN_BYTES is cut evenly, within its bucket too.
    """
    n_rows = len(sorted_buckets)
    at_least = -(-MIN_ROW_GROUP_BYTES // row_bytes)
    at_most = max(1, MAX_SPAN_BYTES // row_bytes)
    cuts = [0]
    for begin in np.flatnonzero(np.diff(sorted_buckets)) + 1:
        if begin - cuts[-1] >= at_least and n_rows - begin >= at_least:
            cuts.append(int(begin))
    pieces = zip(cuts, [*cuts[1:], n_rows], strict=True)
    return [group for begin, end in pieces for group in _evenly(begin, end, at_most)]


def _numbered(ordered: Rows) -> Int32[np.ndarray, " rows"]:
    """The bucket of each row; where there are sections, numbers that are others where a bucket or a section begins."""
    if ordered.section is None or not len(ordered):
        return ordered.bucket
    changes = (np.diff(ordered.bucket) != 0) | (np.diff(ordered.section.codes) != 0)
    return np.concatenate([[0], np.cumsum(changes)]).astype(np.int32)


def _evenly(begin: int, end: int, at_most: int) -> list[slice]:
    """The fewest pieces of at most so many rows, of about one size."""
    n_pieces = -(-(end - begin) // at_most)
    cuts = [begin + (end - begin) * piece // n_pieces for piece in range(n_pieces)]
    return [slice(first, last) for first, last in pairwise([*cuts, end])]


def _join(groups: Sequence[slice], at_most: int) -> Iterator[list[slice]]:
    """Consecutive row groups together, as long as they hold at most so many rows."""
    joined: list[slice] = []
    for group in groups:
        if joined and group.stop - joined[0].start > at_most:
            yield joined
            joined = []
        joined.append(group)
    if joined:
        yield joined


def _span(groups: Sequence[slice], order: Int64[np.ndarray, " rows"], chunk_ends: Int64[np.ndarray, " chunks"]) -> Span:
    begin, end = groups[0].start, groups[-1].stop
    # Rows 0 to 3 lie in the first chunk, 4 to 6 in the second, and on disk they are wanted as 5, 1, 4, 2. Chunks are
    # read front to back, which is what memory is quick at: by_source = [1, 3, 2, 0] turns that into 1, 2, 4, 5,
    wanted = order[begin:end]
    by_source = np.argsort(wanted, kind="stable")
    rows = wanted[by_source]
    # of which 1, 2 are rows 1, 2 of the first chunk, and 4, 5 are rows 0, 1 of the second:
    # sources = [(0, [1, 2]), (1, [0, 1])]
    bounds = np.searchsorted(rows, np.concatenate(([0], chunk_ends)))
    sources = [
        (chunk, rows[first:last] - (chunk_ends[chunk - 1] if chunk else 0))
        for chunk, (first, last) in enumerate(pairwise(bounds))
        if last > first
    ]
    # What is taken, 1, 2, 4, 5, then goes where it was wanted: back = [3, 0, 2, 1] picks 5, 1, 4, 2.
    back = np.empty_like(by_source)
    back[by_source] = np.arange(len(by_source))
    # From one chunk it is picked in that order right away, which saves a copy.
    if len(sources) == 1:
        [(chunk, in_chunk)] = sources
        sources = [(chunk, in_chunk[back])]
    relative = tuple(slice(group.start - begin, group.stop - begin) for group in groups)
    return Span(slice(begin, end), relative, tuple(sources), back)
