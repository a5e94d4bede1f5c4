"""Rows in memory: a block is some row groups whose rows are put in a drawn order, and the next one is read meanwhile.

Two blocks are in memory, in arrays that are used again and again. Threads decode row groups, a few at a time, and copy
them to their place; pyarrow and NumPy let go of the interpreter meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int16, Int64

from sniffer.errors import RunError
from sniffer.reader.cut import cut
from sniffer.reader.training.shares import File, Slice, Wanted, drawn
from sniffer.reader.vectors import probabilities
from sniffer.types import ROW_DTYPES, Rows
from sniffer.words import size as in_words

READERS = 2
"""Threads that decode."""

PIECE_BYTES = 3 * 1024**2
"""That each decodes at a time: of larger pieces the memory goes back to the system, and is taken again page by page."""

ROW_BYTES = 96
"""Of one row, beside its vector: where it is from, twice while pieces are put together, and its place in the order."""


@dataclass(frozen=True)
class Room:
    """Rows that memory is for: of one block, and of what a thread decodes at a time."""

    block: int
    piece: int

    @classmethod
    def of(cls, memory: int, wanted: Wanted) -> Room:
        """Raises RunError where a block would have no room for the largest row group."""
        row, largest = 4 * wanted.dim + ROW_BYTES, wanted.largest
        piece = max(largest, min(PIECE_BYTES, memory // 16) // row)
        block = (memory // row - 2 * READERS * piece) // 2
        if block < largest:
            least = (2 * READERS + 2) * largest * row
            raise RunError(
                f"memory={memory:,} bytes is too small for row groups of {largest:,} rows: take memory={least} "
                f"({in_words(least)}) or more"
            )
        return cls(block, piece)


@dataclass(frozen=True)
class Decoded:
    """Where some rows are from."""

    heads: Int16[np.ndarray, " rows"]
    rows: Rows
    weights: Float64[np.ndarray, " rows"] | None


@dataclass(frozen=True)
class Block:
    """Rows as they were read, and the order in which they are given."""

    vectors: Float32[np.ndarray, "rows dim"]
    origin: Decoded
    order: Int64[np.ndarray, " rows"]


class Filling:
    """A block that is being read into an array."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        wanted: Wanted,
        slices: Sequence[Slice],
        into: Float32[np.ndarray, "rows dim"],
        piece: int,
        weights: bool,
        seeds: Sequence[int] | None,
    ) -> None:
        self._vectors = into[: sum(map(len, slices))]
        self._pieces: list[Future[Decoded]] = []
        place = 0
        for some in _pieces(wanted, slices, piece):
            rows = sum(map(len, some))
            here = self._vectors[place : place + rows]
            self._pieces.append(pool.submit(_decode, wanted, some, here, weights))
            place += rows
        self._order = pool.submit(_order, place, seeds)

    def wait(self) -> Block:
        """Raises RunError where a file cannot be read."""
        found = [piece.result() for piece in self._pieces]
        weights = [one.weights for one in found if one.weights is not None]
        origin = Decoded(
            np.concatenate([one.heads for one in found]),
            Rows.joined([one.rows for one in found]),
            np.concatenate(weights) if weights else None,
        )
        return Block(self._vectors, origin, self._order.result())


def _order(rows: int, seeds: Sequence[int] | None) -> Int64[np.ndarray, " rows"]:
    return np.arange(rows) if seeds is None else drawn(rows, *seeds)


def _pieces(wanted: Wanted, slices: Sequence[Slice], most: int) -> Iterator[list[Slice]]:
    """Slices that are decoded together: of one file, in its order."""
    in_file = sorted(slices, key=lambda one: (one.file, one.group))
    for _, of_file in groupby(in_file, key=lambda one: one.file):
        yield from cut(of_file, most, lambda one: wanted.files[one.file].contents.rows[one.group])


def _decode(wanted: Wanted, slices: Sequence[Slice], into: Float32[np.ndarray, "rows dim"], weights: bool) -> Decoded:
    """Reads slices of one file, their vectors into an array."""
    file = wanted.files[slices[0].file]
    numbers = [one.group for one in slices]
    known = [file.head(number) for number in numbers] if _all_of(file, slices) else [None]
    table = file.read(numbers, [*(["head"] if None in known else []), *ROW_DTYPES, "vector"])
    rows = Rows.from_columns(table)
    if None in known:
        heads, chosen = table["head"].to_numpy(), _chosen(file, slices, table)
    else:
        heads, chosen = np.repeat(np.array(known, np.int16), list(map(len, slices))), None
    if (found := table.num_rows if chosen is None else len(chosen)) != len(into):
        raise RunError(
            f"{file.folder / file.name} has {found:,} rows where its footer told of {len(into):,}: "
            f"`python -m sniffer.runs verify {file.folder}` tells more"
        )
    if chosen is not None:
        rows, heads = rows[chosen], heads[chosen]
    done = place = 0
    for chunk in table["vector"].chunks:
        vectors = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, wanted.dim)
        done += len(vectors)
        if chosen is not None:
            here = chosen[place : np.searchsorted(chosen, done)] - (done - len(vectors))
            vectors = vectors[here]
        into[place : place + len(vectors)] = vectors
        place += len(vectors)
    return Decoded(heads, rows, _weights(file, rows) if weights else None)


def _all_of(file: File, slices: Sequence[Slice]) -> bool:
    """Whether these are whole row groups."""
    return all(len(one) == file.contents.rows[one.group] for one in slices)


def _chosen(file: File, slices: Sequence[Slice], table: pa.Table) -> Int64[np.ndarray, " rows"]:
    """Where in the row groups that were read, one below the other, the rows of slices are."""
    good, places, start = file.wanted(table), [], 0
    for one in slices:
        end = start + file.contents.rows[one.group]
        places.append(start + np.flatnonzero(good[start:end])[one.first : one.last])
        start = end
    return np.concatenate(places)


def _weights(file: File, rows: Rows) -> Float64[np.ndarray, " rows"]:
    try:
        return 1 / probabilities(file.law, rows.bucket, rows.section, file.kept)
    except KeyError as error:
        raise RunError(
            f"{file.folder / file.name} has rows of bucket {error}, which its manifest does not know: "
            f"`python -m sniffer.runs verify {file.folder}` tells more"
        ) from error
