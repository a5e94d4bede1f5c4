"""Logits of picked queries over all keys, as a layer really uses them: scaled, capped, masked, with sinks and biases.

From a call of attention (calls.py), or, where attention is no call but products in a layer's own code, from the layer's
softmax as it runs. What comes out is proven (prove.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from sniffer.errors import UnsupportedModelError
from sniffer.forward.attention.calls import Call, by_steps
from sniffer.forward.attention.masks import mask_rows
from sniffer.tap import Seen

SLICE_BYTES = 32 << 20
"""Of logits that are in memory at a time, about; a slice has at least one query of one key head."""


@dataclass(frozen=True)
class Queries:
    """Picked queries of one text of a batch: its row, and their positions, ascending, here and on the device.

    `first` is the position of the first query that there is, of which all others are counted: 0 but in steps.
    """

    row: int
    positions: Int32[np.ndarray, " picks"]
    index: Int[Tensor, " picks"]
    first: int = 0

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def places(self) -> Int[Tensor, " picks"]:
        """Which of the queries they are."""
        return self.index - self.first if self.first else self.index

    def some(self, count: int) -> Queries:
        """At most so many of them, the first and the last among them."""
        which = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64))
        index = self.index[torch.from_numpy(which).to(self.index.device)]
        return Queries(self.row, self.positions[which], index, self.first)

    def until(self, position: int) -> Queries:
        """Those before a position."""
        count = int(np.searchsorted(self.positions, position))
        return Queries(self.row, self.positions[:count], self.index[:count], self.first)


@dataclass(frozen=True)
class Slice:
    """Logits of some queries of one text, and the values that belong to them.

    Attributes:
        picks: which of the picks they are, in their order.
        heads: which query heads, ascending.
        logits: float32, (heads, picks, keys + sinks); keys count from the text's first token.
        values: (key heads, keys, dim); query heads share them in order.
        keys: how many there are.
    """

    picks: slice
    heads: slice
    logits: Float[Tensor, "heads picks columns"]
    values: Float[Tensor, "key_heads keys dim"]
    keys: int


class Scores(Protocol):
    """Where the logits of a layer are to be had from, for one forward."""

    @property
    def q(self) -> Float[Tensor, "batch heads seq dim"]: ...

    @property
    def k(self) -> Float[Tensor, "batch key_heads keys dim"]: ...

    @property
    def v(self) -> Float[Tensor, "batch key_heads keys dim"]: ...

    def slices(self, queries: Queries) -> Iterator[Slice]:
        """The logits of some queries, a few at a time.

        Raises:
            UnsupportedModelError: they cannot be had.
        """

    def returned(self, queries: Queries) -> Float[Tensor, "heads picks dim"]:
        """What attention gave there, before heads are mixed."""


@dataclass(frozen=True)
class FromCall:
    """By the family's own function, called again for the picked queries.

    `ungrouped`: query heads of one key head are laid side by side, which saves repeating the keys; to be shown first
    (prove.py).
    """

    call: Call
    ungrouped: bool = False

    @property
    def q(self) -> Float[Tensor, "batch heads seq dim"]:
        return self.call.q

    @property
    def k(self) -> Float[Tensor, "batch key_heads keys dim"]:
        return self.call.k

    @property
    def v(self) -> Float[Tensor, "batch key_heads keys dim"]:
        return self.call.v

    def slices(self, queries: Queries) -> Iterator[Slice]:
        call, ungrouped, row = self.call, self.ungrouped, queries.row
        keys = int(queries.positions[-1]) + 1 if call.causal else call.k.shape[2]
        n_heads, key_heads = call.q.shape[1], call.k.shape[1]
        groups = n_heads // key_heads
        at_once = max(1, SLICE_BYTES // (4 * keys * (groups if ungrouped else n_heads)))
        heads_at_once = max(1, SLICE_BYTES // (4 * keys * call.k.shape[3])) if ungrouped else key_heads
        for first_head in range(0, key_heads, heads_at_once):
            chosen = slice(first_head, min(key_heads, first_head + heads_at_once))
            k, values = call.k[row : row + 1, chosen, :keys].float(), call.v[row, chosen, :keys].float()
            wanted = slice(chosen.start * groups, chosen.stop * groups)
            for first in range(0, len(queries), at_once):
                picks = slice(first, min(len(queries), first + at_once))
                places = queries.places[picks]
                q = call.q[row : row + 1, wanted].index_select(2, places).float()
                mask = mask_rows(call, row, places, keys, queries.first)
                yield Slice(picks, wanted, by_steps(call, q, k, mask, ungrouped=ungrouped), values, keys)

    def returned(self, queries: Queries) -> Float[Tensor, "heads picks dim"]:
        return self.call.returned[queries.row].index_select(1, queries.places).float()


@dataclass(frozen=True)
class FromSoftmax:
    """As they entered the softmax in a layer's own code, which has them of all queries at once.

    `logits` are (batch, heads, seq, columns) and `product` (batch, heads, seq, dim), or the first two axes in one.
    """

    seen: Seen
    logits: Tensor
    product: Tensor

    @property
    def q(self) -> Float[Tensor, "batch heads seq dim"]:
        return self.seen.q

    @property
    def k(self) -> Float[Tensor, "batch key_heads keys dim"]:
        return self.seen.k

    @property
    def v(self) -> Float[Tensor, "batch key_heads keys dim"]:
        return self.seen.v

    def slices(self, queries: Queries) -> Iterator[Slice]:
        logits = self._by_row(self.logits)[queries.row].index_select(1, queries.index).float()
        keys, values = self.seen.k.shape[2], self.seen.v[queries.row].float()
        yield Slice(slice(0, len(queries)), slice(0, logits.shape[0]), logits, values, keys)

    def returned(self, queries: Queries) -> Float[Tensor, "heads picks dim"]:
        return self._by_row(self.product)[queries.row].index_select(1, queries.index).float()

    def _by_row(self, one: Tensor) -> Tensor:
        batch, heads, seq = self.seen.q.shape[:3]
        if one.shape[:3] == (batch, heads, seq):
            return one
        if one.shape[:2] == (batch * heads, seq):
            return one.unflatten(0, (batch, heads))
        raise UnsupportedModelError(
            f"{type(self.seen.module).__name__} has softmax of shape {tuple(one.shape)} in its code, which is not known"
        )
