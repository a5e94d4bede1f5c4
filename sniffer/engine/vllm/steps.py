"""Which tokens of vLLM's steps are picked. Knows neither vLLM nor layers' code, so that it can be tested alone.

A step computes some tokens of each of several requests, one request after the other in a flat row of tokens:

    request      A A A A A C C C C B            A is at its positions 5 to 9, C begins, B writes its 13th token
    position     5 6 7 8 9 0 1 2 3 12

A request's tokens come in the order of their positions, in pieces (chunked prefill). After a preemption they come again
from the first on: what was had already is passed over. What was never computed here, as with a cached prefix, is an
error, for it would be a row that is missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int32, Int64, Shaped
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.forward.generation.live import ROW, Places
from sniffer.types import draw_of

Pair = tuple[int, str]
"""A layer, and a kind or draw."""


class Steps:
    """The picked rows of one batch of documents, gathered step by step.

    Args:
        rows: the document in the batch that each request is.
        places: by (layer, draw), what is to be kept, ascending.
    """

    def __init__(self, rows: Mapping[str, int], places: Mapping[Pair, Places]) -> None:
        self.reached = np.zeros(max(rows.values(), default=-1) + 1, dtype=np.int64)
        """Tokens of each document that have been computed."""
        self.again = 0
        """Tokens that have been computed more than once."""
        self._rows = rows
        self._places = dict(places)
        # One array for all draws, so that a step is one search: draws one after the other, each ascending.
        self._pairs = list(self._places)
        spans = np.arange(len(self._pairs), dtype=np.int64) * len(self.reached)
        shifted = [self._places[pair] + span * ROW for pair, span in zip(self._pairs, spans, strict=True)]
        self._keys = np.concatenate([np.empty(0, np.int64), *shifted])
        self._spans = spans
        self._now: dict[Pair, tuple[Places, slice]] = {}
        self._index: Int32[np.ndarray, " picks"] = np.empty(0, np.int32)
        self._uploaded: dict[torch.device, Tensor] = {}
        self._pieces: dict[Pair, list[tuple[Places, Tensor]]] = defaultdict(list)

    def begin(
        self, requests: Sequence[str], starts: Int64[np.ndarray, " requests"], counts: Int64[np.ndarray, " requests"]
    ) -> None:
        """A step with `counts` tokens of each request, of which the first is at the position in `starts`.

        Raises:
            CaptureError: a request that is none of ours, or tokens before these that were not computed.
        """
        self._uploaded.clear()
        self._now = {}
        if unknown := [name for name in requests if name not in self._rows]:
            raise CaptureError(f"vLLM computes {unknown[0]!r}, which is no request of this run: please report this")
        rows = np.array([self._rows[name] for name in requests], dtype=np.int64)
        ends, reached = starts + counts, self.reached[rows]
        if (late := starts > reached).any():
            place = int(np.argmax(late))
            raise CaptureError(
                f"vLLM goes on at position {starts[place]} of a document of which it has computed {reached[place]} "
                "tokens here: the others would be missing; please report this"
            )
        self.again += int((np.minimum(reached, ends) - starts).sum())
        self.reached[rows] = np.maximum(reached, ends)
        first = np.maximum(starts, reached)
        texts = self._spans[:, None] + rows
        low = np.searchsorted(self._keys, texts * ROW + first)
        high = np.searchsorted(self._keys, texts * ROW + np.maximum(first, ends))
        many = high - low
        total = int(many.sum())
        if not total:
            return
        # Pieces of the keys, one for each draw and request, side by side.
        before = np.cumsum(many.ravel()) - many.ravel()
        at = np.arange(total) + np.repeat(low.ravel() - before, many.ravel())
        offsets = np.cumsum(counts) - counts - starts
        self._index = (self._keys[at] % ROW + np.repeat(np.tile(offsets, len(self._pairs)), many.ravel())).astype(
            np.int32
        )
        bounds = np.concatenate([[0], np.cumsum(many.sum(1))])
        for number, pair in enumerate(self._pairs):
            here = slice(int(bounds[number]), int(bounds[number + 1]))
            if here.stop > here.start:
                self._now[pair] = self._keys[at[here]] - self._spans[number] * ROW, here

    def keep(
        self, layer: int, kind: str, states: Shaped[Tensor, "tokens values"], heads: Tensor | None, n_heads: int
    ) -> None:
        """The picked tokens of this step, of a layer's vectors; `heads` are those to keep, None for all."""
        found = self._now.get(draw_of((layer, kind)))
        if found is None:
            return
        places, here = found
        if states.device not in self._uploaded:
            self._uploaded[states.device] = torch.from_numpy(self._index).to(states.device, non_blocking=True)
        flat = states.flatten(1).index_select(0, self._uploaded[states.device][here])
        if heads is not None:
            flat = flat.view(len(flat), n_heads, -1).index_select(1, heads).flatten(1)
        self._pieces[layer, kind].append((places, flat))

    def wants(self, layer: int, kind: str) -> bool:
        """Whether this step has something of a layer's vectors."""
        return draw_of((layer, kind)) in self._now

    def taken(self, pairs: Sequence[Pair], wanted: Mapping[Pair, Places]) -> dict[Pair, Tensor]:
        """The rows at these places, by (layer, draw), of each (layer, kind), in order.

        Raises:
            CaptureError: one was not computed.
        """
        return {pair: self._ordered(pair, wanted[draw_of(pair)]) for pair in pairs}

    def _ordered(self, pair: Pair, wanted: Places) -> Tensor:
        pieces = self._pieces.pop(pair, [])
        found = np.concatenate([np.empty(0, np.int64), *(places for places, _ in pieces)])
        order = np.argsort(found, kind="stable")
        at = np.searchsorted(found[order], wanted)
        if len(wanted) and (at.max() >= len(found) or (found[order][at] != wanted).any()):
            raise CaptureError(f"layer {pair[0]} of vLLM's model has not shown its {pair[1]} of every picked token")
        if not pieces:
            return torch.empty((0, 0))
        together = torch.cat([vectors for _, vectors in pieces])
        return together.index_select(0, torch.from_numpy(order[at]).to(together.device))
