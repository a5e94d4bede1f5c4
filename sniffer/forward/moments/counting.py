"""Counting: the moments of one batch as its layers are seen, and those of all batches that a worker has had.

Positions that belong together (of one bucket and section) are stretches of a document. Documents of a batch that have
the same stretch are taken together where steps are dear, which is on any device but a processor. Where a model shows
a document piece by piece, each piece is counted by itself, and then they are `joined`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from sniffer.forward.moments.cores import by_heads, on_cores
from sniffer.forward.moments.sums import MANY, SHORT, Span, Stack, Sums, piece_of
from sniffer.sampler import Picker
from sniffer.types import KIND, NONE, Document, MomentRows, MomentsLayout, Rope, TokenBatch

TOGETHER = {"cpu": 1}
"""Documents that are taken together, by device; others have TOGETHER_ELSEWHERE."""

TOGETHER_ELSEWHERE = 16

Key = tuple[int, str]
"""Bucket and section."""

Keyed = tuple[Span, tuple[Key, ...]]
"""Stretches, and the key of each."""

Group = tuple[slice, tuple[Span, ...], tuple[Key, ...]]
"""Rows of documents with the same stretches, which they are, and the key of each."""


@dataclass(frozen=True)
class Lies:
    """Where positions of a batch's document are in what layers show: those of [first, end), from `column` on.

    `document` is its number in the batch; None where that is the row's.
    """

    row: int
    first: int
    end: int
    column: int = 0
    document: int | None = None

    @property
    def number(self) -> int:
        return self.row if self.document is None else self.document


@dataclass(frozen=True)
class MomentsPlan:
    """What is counted: the heads of each (layer, kind), which positions belong together, how layers turn vectors."""

    layout: MomentsLayout
    heads: Mapping[tuple[int, str], tuple[int, ...]]
    picker: Picker
    rope: Mapping[int, Rope] = field(default_factory=dict)

    def pairs(self, layer: int, kind: str) -> tuple[slice, slice] | None:
        """Where the values are that RoPE turns together; None where nothing turns, or that is not known."""
        rope = self.rope.get(layer)
        if kind == "v" or rope is None or not rope.inv_freq:
            return None
        return rope.places(pre=KIND[kind].pre)

    def kinds_of(self, layer: int) -> tuple[str, ...]:
        return tuple(kind for other, kind in self.heads if other == layer)

    def stretches(
        self, document: Document, draw: str, first: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, int, Key]]:
        """From which position to before which other, with the bucket and section of these; of [first, end)."""
        end = document.n_tokens if end is None else end
        buckets = self.picker.side(draw).buckets_until(end)[first:]
        names, codes = self._sections(document)
        codes = codes[first - document.first_position : end - document.first_position]
        changes = np.flatnonzero((np.diff(buckets) != 0) | (np.diff(codes) != 0)) + 1
        for start, stop in pairwise([0, *changes.tolist(), end - first]):
            yield first + start, first + stop, (int(buckets[start]), names[codes[start]])

    def spans(self, document: Document, draw: str, lies: Lies) -> Iterator[Keyed]:
        """The same, short ones together, at the columns where they are."""
        sizes: list[int] = []
        keys: list[Key] = []
        begun, shift = lies.first, lies.column - lies.first
        for start, end, key in self.stretches(document, draw, lies.first, lies.end):
            if sizes and (end - begun > SHORT or len(sizes) == MANY):
                yield Span(begun + shift, tuple(sizes)), tuple(keys)
                sizes, keys, begun = [], [], start
            sizes.append(end - start)
            keys.append(key)
        yield Span(begun + shift, tuple(sizes)), tuple(keys)

    def _sections(self, document: Document) -> tuple[tuple[str, ...], np.ndarray]:
        if not self.layout.sections or document.sections is None:
            return (NONE,), np.zeros(document.n_tokens, dtype=np.int32)
        named = document.sections.names
        counted = tuple(name if name in self.layout.sections else NONE for name in named.known)
        places = {name: place for place, name in enumerate(counted)}
        return counted, np.array([places[name] for name in counted], dtype=np.int32)[named.codes]


class Totals:
    """Moments of whole batches, and the documents that they are of."""

    def __init__(self, plan: MomentsPlan) -> None:
        self.plan = plan
        self.documents: list[int] = []
        self.sums: dict[tuple[int, str], dict[Key, Sums]] = {pair: {} for pair in plan.heads}

    def take(self, batch: Counting) -> None:
        """Takes in what a batch gave; of its sums, those that are new here are not copied."""
        self.documents += batch.documents
        for device, pairs in batch.seen_on.items():
            on_cores([partial(_add_all, self.sums[pair], batch.sums[pair]) for pair in pairs], device)
        batch.sums, batch.seen_on = {}, {}

    def rows(self) -> Iterator[list[MomentRows]]:
        """All there is of each (layer, kind), by bucket and section."""
        for (layer, kind), by_key in self.sums.items():
            heads = self.plan.heads[layer, kind]
            yield [_as_rows(layer, kind, heads, key, by_key[key]) for key in sorted(by_key)]


class Counting:
    """The moments of one batch, but of documents that were counted before.

    Args:
        lies: what is shown of the documents, and where; None for all of each, from the first column on.
    """

    def __init__(
        self,
        plan: MomentsPlan,
        batch: TokenBatch,
        done: Collection[int] = (),
        lies: Sequence[Lies] | None = None,
    ) -> None:
        self.plan = plan
        rows = [row for row, document in enumerate(batch.documents) if document.example_id not in done]
        self.documents = [batch.documents[row].example_id for row in rows]
        self.sums: dict[tuple[int, str], dict[Key, Sums]] = {}
        self.seen_on: dict[torch.device, list[tuple[int, str]]] = {}
        sides = {KIND[kind].draw for _, kind in plan.heads}
        if lies is None:
            lies = [Lies(row, 0, document.n_tokens) for row, document in enumerate(batch.documents)]
        counted = [(one, batch.documents[one.number]) for one in lies if one.number in rows and one.end > one.first]
        self._spans = {
            side: [(one.row, found) for one, document in counted for found in plan.spans(document, side, one)]
            for side in sides
        }
        self._groups: dict[tuple[str, int], list[Group]] = {}

    def see(self, layer: int, kind: str, states: Shaped[Tensor, "batch heads seq dim"], heads: Tensor | None) -> None:
        """Takes what a layer shows of a kind.

        Args:
            heads: those to count, as an index on the states' device; None for all.
        """
        if heads is not None:
            states = states.index_select(1, heads)
        groups = self._grouped(KIND[kind].draw, TOGETHER.get(states.device.type, TOGETHER_ELSEWHERE))
        second, pairs = self.plan.layout.second, self.plan.pairs(layer, kind)
        stacks = [Stack(states[rows], spans, second, pairs) for rows, spans, _ in groups]

        def put(part: slice, some: Tensor) -> None:
            for (rows, spans, _), stack in zip(groups, stacks, strict=True):
                shown = ((some[rows, :, span.start : span.end], span) for span in spans)
                stack.put(part, [piece_of(states, span, second, pairs) for states, span in shown])

        found: dict[Key, Sums] = {}

        def add_up() -> None:
            for (*_, keys), stack in zip(groups, stacks, strict=True):
                for place, key in enumerate(keys):
                    _add(found, key, stack[place])

        by_heads(put, states)
        on_cores([add_up], states.device)
        self.sums[layer, kind] = found
        self.seen_on.setdefault(states.device, []).append((layer, kind))

    def join(self, pair: tuple[int, str], other: Counting) -> None:
        """Takes over what other pieces of the same documents gave of a (layer, kind); what is new is not copied."""
        by_key = other.sums.pop(pair)
        device = next(device for device, pairs in other.seen_on.items() if pair in pairs)
        other.seen_on[device].remove(pair)
        if pair not in self.sums:
            self.sums[pair] = {}
            self.seen_on.setdefault(device, []).append(pair)
        on_cores([partial(_add_all, self.sums[pair], by_key)], device)

    def _grouped(self, side: str, together: int) -> list[Group]:
        """The same for all layers."""
        if (side, together) not in self._groups:
            self._groups[side, together] = list(_grouped(self._spans[side], together))
        return self._groups[side, together]


def _add_all(to: dict[Key, Sums], by_key: Mapping[Key, Sums]) -> None:
    for key, sums in by_key.items():
        _add(to, key, sums)


def _add(to: dict[Key, Sums], key: Key, sums: Sums) -> None:
    """Adds sums to those of the same key; the first ones are kept as they are, and not copied."""
    if key in to:
        to[key].add(sums)
    else:
        to[key] = sums


def _grouped(spans: list[tuple[int, Keyed]], together: int) -> Iterator[Group]:
    """Rows that follow one another and have the same stretches, as many together as is said; short groups are one."""
    begun: dict[Keyed, tuple[int, int]] = {}
    found: dict[tuple[int, int], list[Keyed]] = {}
    for row, one in spans:
        here = begun.get(one)
        if here is not None and here[1] == row - 1 and row - here[0] < together:
            begun[one] = here[0], row
            continue
        if here is not None:
            found.setdefault(here, []).append(one)
        begun[one] = row, row
    for one, here in begun.items():
        found.setdefault(here, []).append(one)
    for (first, last), keyed in found.items():
        rows = slice(first, last + 1)
        for some in _in_stacks(keyed):
            yield rows, tuple(span for span, _ in some), tuple(key for _, keys in some for key in keys)


def _in_stacks(keyed: Sequence[Keyed]) -> Iterator[list[Keyed]]:
    """Of about as many stretches as a span may have."""
    some: list[Keyed] = []
    for one in keyed:
        if some and sum(len(keys) for _, keys in [*some, one]) > MANY:
            yield some
            some = []
        some.append(one)
    yield some


def _as_rows(layer: int, kind: str, heads: tuple[int, ...], key: Key, sums: Sums) -> MomentRows:
    second, dim = sums.second, sums.mean.shape[-1]
    if second is None:
        flat = np.empty((len(heads), 0))
    elif second.ndim == 2:
        flat = second.cpu().numpy()
    else:
        upper = np.triu_indices(dim)
        flat = second.cpu().numpy()[:, upper[0], upper[1]]
    values = (tensor.cpu().numpy() for tensor in (sums.minimum, sums.maximum, sums.lengths))
    return MomentRows(layer, kind, heads, *key, sums.n, sums.mean.cpu().numpy(), flat, *values)
