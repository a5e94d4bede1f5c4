"""Batches of rows: each row once an epoch, in an order that follows from the seed, the rank and the memory alone.

A state says how many batches have been given, and of what. What goes on from it reads no block before the one it is in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int16

from sniffer.errors import RunError
from sniffer.reader.cut import cut
from sniffer.reader.held import Held
from sniffer.reader.laws import ranges
from sniffer.reader.training.blocks import READERS, Block, Filling, Room
from sniffer.reader.training.shares import Slice, Wanted, digest_of, unknown_law, wanted_of
from sniffer.reader.vectors import FromRows
from sniffer.types import KIND, Rows

MEMORY = 256 * 1024**2
"""Bytes that rows may take while they wait for their turn, unless `memory` says otherwise."""

BLOCK_SEED = 1
"""Sets the orders of rows in blocks apart from that of row groups."""


@dataclass(frozen=True)
class Batch(FromRows):
    """Some rows of one layer and kind; the arrays are the caller's own.

    `rows` say where they are from; `positions`, `buckets`, `token_ids`, `example_ids` and `sections` are its columns.
    `weights` are 1 / inclusion_probability, with which sums over rows estimate those over all positions without bias
    (Horvitz and Thompson, 1952); None unless they were asked for.
    """

    vectors: Float32[np.ndarray, "n head_dim"]
    heads: Int16[np.ndarray, " n"]
    rows: Rows
    weights: Float64[np.ndarray, " n"] | None = None


@dataclass(frozen=True)
class Arguments:
    """What decides which rows a batch has; `of` stands for the files that they are in."""

    of: str
    layer: int
    kind: str
    heads: tuple[int, ...]
    size: int
    shuffle: int | None
    rank: int
    world: int
    memory: int

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "heads": list(self.heads)}

    def require(self, state: Mapping[str, Any]) -> None:
        """Raises RunError where a state is of other batches."""
        for name, mine in self.as_json().items():
            if name not in state:
                raise RunError(f"this is no state of batches: it has no {name!r}; take what state_dict() gave")
            if state[name] != mine:
                if name == "of":
                    raise RunError("the state is of another run, or of this one before its rows changed: begin anew")
                raise RunError(f"the state is of batches with {name}={state[name]!r}, these have {name}={mine!r}")


class Batches:
    """Batches of one layer and kind. A loop begins with the first one, or once where `load_state_dict` has said.

    Attributes:
        rows: of this rank, in an epoch.
    """

    def __init__(self, wanted: Wanted, arguments: Arguments, epochs: int, weights: bool) -> None:
        self._wanted, self._arguments, self._epochs, self._weights = wanted, arguments, epochs, weights
        n, rank, world = len(wanted), arguments.rank, arguments.world
        if n < world:
            raise RunError(f"{n:,} rows cannot be shared among world={world} ranks: take fewer")
        if arguments.size == 1 and n % world:
            raise RunError(
                f"{n:,} rows are not as many batches of size=1 for each of {world} ranks: take size=2 or more"
            )
        self.rows = n * (rank + 1) // world - n * rank // world
        self._room = Room.of(arguments.memory, wanted)
        self._start = self._given = 0

    def __repr__(self) -> str:
        its = self._arguments
        return f"Batches(layer={its.layer}, kind={its.kind!r}, {self.rows:,} rows, rank {its.rank} of {its.world})"

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch, the same number for each rank."""
        most = -(-len(self._wanted) // self._arguments.world)
        return -(-most // self._arguments.size)

    def __len__(self) -> int:
        """Batches in all epochs."""
        return self.per_epoch * self._epochs

    def __iter__(self) -> Iterator[Batch]:
        """Raises RunError, in the loop, where a file has become unreadable."""
        start, self._start = self._start, 0
        self._given = start
        return self._loop(start)

    def state_dict(self) -> dict[str, Any]:
        """Where the last loop is: after the batch that it gave last. Numbers and texts only, as JSON has them."""
        return {**self._arguments.as_json(), "batches": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next loop begin where a state says.

        Raises:
            RunError: the state is of another run, of other arguments (but `epochs` and `weights`, which change no
                batch's rows), or of more batches than there are.
        """
        self._arguments.require(state)
        given = state.get("batches")
        if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= len(self):
            raise RunError(
                f"the state is after {given!r} batches, and there are {len(self):,}: take more epochs, or begin anew"
            )
        self._start = self._given = given

    def shard(self, number: int, among: int) -> Batches:
        """One of several equal parts of what this rank has: for a worker of several."""
        its = self._arguments
        mine = replace(its, rank=its.rank * among + number, world=its.world * among)
        return Batches(self._wanted, mine, self._epochs, self._weights)

    def _loop(self, start: int) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(READERS, "batches")
        try:
            blocks = self._blocks(pool, start)
            block, place = None, 0
            for given in range(start, len(self)):
                first, last = self._bounds(given % self.per_epoch)
                pieces = []
                left = last - first
                while left:
                    if block is None or place == len(block.order):
                        block, place = None, 0  # its array is filled again
                        block = next(blocks)
                    some = block.order[place : place + left]
                    pieces.append(_take(block, some))
                    place, left = place + len(some), left - len(some)
                self._given = given + 1
                yield pieces[0] if len(pieces) == 1 else _joined(pieces)
        finally:
            pool.shutdown(cancel_futures=True)

    def _bounds(self, number: int) -> tuple[int, int]:
        """Of a batch in its epoch, among the rows of the rank. Each has a row, where the rank has one less too."""
        size, n = self._arguments.size, self.per_epoch
        first, last = (min(end * size, self.rows - (n - end)) for end in (number, number + 1))
        return first, last

    def _blocks(self, pool: ThreadPoolExecutor, start: int) -> Iterator[Block]:
        """Those from a batch on, the first one from that batch's first row on; the next is being read."""
        coming = self._fillings(pool, start)
        filling = next(coming, None)
        while filling is not None:
            skip, now = filling
            block = now.wait()
            filling = next(coming, None)
            yield replace(block, order=block.order[skip:])

    def _fillings(self, pool: ThreadPoolExecutor, start: int) -> Iterator[tuple[int, Filling]]:
        most = min(self._room.block, self.rows)
        arrays = [np.empty((most, self._wanted.dim), np.float32) for _ in range(2)]
        n, turn = self.per_epoch, 0
        for epoch in range(start // n, self._epochs):
            skip = self._bounds(start % n)[0] if epoch == start // n else 0
            for number, slices in enumerate(self._cut(epoch)):
                rows = sum(map(len, slices))
                if skip >= rows:
                    skip -= rows
                    continue
                into, turn = arrays[turn], 1 - turn
                seeds = self._seeds(epoch, number)
                yield skip, Filling(pool, self._wanted, slices, into, self._room.piece, self._weights, seeds)
                skip = 0

    def _cut(self, epoch: int) -> Iterator[list[Slice]]:
        its = self._arguments
        return cut(self._wanted.share(its.shuffle, epoch, its.rank, its.world), self._room.block, len)

    def _seeds(self, epoch: int, block: int) -> tuple[int, ...] | None:
        its = self._arguments
        return None if its.shuffle is None else (its.shuffle, epoch, BLOCK_SEED, its.rank, its.world, block)


def batches_of(
    runs: Sequence[tuple[Held, Collection[str] | None]],
    *,
    layer: int,
    kind: str,
    heads: Iterable[int] | None,
    size: int,
    shuffle: int | None,
    weights: bool,
    rank: int,
    world: int,
    epochs: int,
    memory: int,
) -> Batches:
    """As `Run.batches`, over some runs that have no row in common, each with the sections wanted (None: all)."""
    least = {"size": (size, 1), "world": (world, 1), "rank": (rank, 0), "epochs": (epochs, 1), "memory": (memory, 1)}
    if shuffle is not None:
        least["shuffle"] = (shuffle, 0)
    for name, (value, lowest) in least.items():
        if not _integer(value) or value < lowest:
            raise RunError(f"{name}={value!r} cannot be: take an integer from {lowest} on")
    if rank >= world:
        raise RunError(f"rank={rank} cannot be: ranks count from 0, the last of world={world} is {world - 1}")
    chosen = _heads(runs, layer, kind, heads)
    wanted = wanted_of(runs, layer, kind, chosen)
    if not wanted.groups:
        raise RunError(f"layer {layer}, kind {kind}, heads {ranges(chosen)} has no rows")
    if weights and unknown_law(wanted):
        raise RunError(
            "weights=True cannot be: rows were imported without their sampler, so their probabilities are unknown"
        )
    seed = None if shuffle is None else int(shuffle)
    of = digest_of(runs, layer, kind)
    arguments = Arguments(of, int(layer), kind, chosen, int(size), seed, int(rank), int(world), int(memory))
    return Batches(wanted, arguments, int(epochs), weights)


def _heads(
    runs: Sequence[tuple[Held, Collection[str] | None]], layer: int, kind: str, heads: Iterable[int] | None
) -> tuple[int, ...]:
    """In their order, without repeats."""
    known = [run.heads(layer, kind) for run, _ in runs]
    if KIND[kind].statistics:
        raise RunError(f"kind {kind} has no vectors, of which batches are: run.attention(layer={layer}, q_head=...)")
    if heads is None:
        return tuple(sorted(set().union(*known)))
    listed = [*heads] if isinstance(heads, Iterable) else [None]
    if not all(map(_integer, listed)):
        raise RunError(f"heads={heads!r} cannot be: take a list of integers, such as [0], or None for all")
    chosen = tuple(sorted(set(map(int, listed))))
    if not chosen:
        raise RunError("heads is empty: name some, or None for all")
    for head in chosen:
        if not any(head in one for one in known):
            raise RunError(f"head {head} was not captured: layer {layer}, kind {kind} has heads {ranges(known[0])}")
    return chosen


def _integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _take(block: Block, places: np.ndarray) -> Batch:
    vectors = np.empty((len(places), block.vectors.shape[1]), np.float32)
    # Other modes would take a copy first, in case a place lies outside.
    np.take(block.vectors, places, axis=0, out=vectors, mode="clip")
    origin = block.origin
    weights = None if origin.weights is None else origin.weights[places]
    return Batch(vectors, origin.heads[places], origin.rows[places], weights)


def _joined(pieces: Sequence[Batch]) -> Batch:
    weights = [piece.weights for piece in pieces if piece.weights is not None]
    return Batch(
        np.concatenate([piece.vectors for piece in pieces]),
        np.concatenate([piece.heads for piece in pieces]),
        Rows.joined([piece.rows for piece in pieces]),
        np.concatenate(weights) if weights else None,
    )
