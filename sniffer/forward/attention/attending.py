"""Statistics of attention, layer by layer, while one batch goes through the model.

It is shown the calls of attention when they are over, or the softmax of layers that attend in their own code. What it
computes is of the picked queries alone, and touches nothing that the model computes with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.forward.attention.calls import Call
from sniffer.forward.attention.prove import Way, require_proven
from sniffer.forward.attention.scores import FromCall, FromSoftmax, Queries, Scores
from sniffer.forward.attention.softmax import Watch
from sniffer.forward.attention.statistics import BucketRuns, NamedSections, statistics
from sniffer.tap import Attended, Seen
from sniffer.types import ATTENTION, AttentionLayout, Picks, TokenBatch, draw_of

PROVEN_QUERIES = 4
"""Of a text that is longer than any before: the first, the last, and some in between are looked at once more."""


@dataclass
class AttentionPlan:
    """What stays the same for every batch of a run.

    Attributes:
        layout: what is kept of a row.
        ways: how logits are had, by layer.
        buckets: the sampler's, of every position that there may be.
        proven: the longest text for which what is computed was compared with what attention returned.
    """

    layout: AttentionLayout
    ways: Mapping[int, Way]
    buckets: np.ndarray
    proven: int = 0
    _runs: dict[torch.device, BucketRuns] = field(default_factory=dict)

    def runs(self, device: torch.device) -> BucketRuns:
        if device not in self._runs:
            self._runs[device] = BucketRuns.of(self.buckets, device)
        return self._runs[device]

    @property
    def inline(self) -> bool:
        """Whether some layer's softmax has to be looked at as it runs."""
        return any(way.inline for way in self.ways.values())


class Keeper(Protocol):
    """Who the statistics are for: the batch's observer."""

    @property
    def picks(self) -> Mapping[tuple[int, str], Picks]: ...

    def index(self, layer: int, kind: str, device: torch.device) -> Int[Tensor, " picks"]:
        """Where the picks of a (layer, kind) are on a device: row * seq + position."""

    def keep_statistics(self, layer: int, columns: Float32[Tensor, "picks heads width"]) -> None:
        """Takes the statistics of a layer, all query heads."""


class Attending:
    """Computes the statistics of one batch. `seconds` is the time spent at it."""

    def __init__(self, plan: AttentionPlan, batch: TokenBatch, keeper: Keeper) -> None:
        self.plan = plan
        self.batch = batch
        self.seconds = 0.0
        self.mode = Watch()
        self._keeper = keeper
        self._sections = NamedSections(plan.layout.sections, [one.sections for one in batch.documents])
        self._proves = batch.seq_len > plan.proven
        self._longest = max(range(batch.n_rows), key=lambda row: batch.documents[row].n_tokens)

    def show(self, layer: int, seen: Seen) -> None:
        """A layer is about to attend; if it does in its own code, its softmax is looked at."""
        self.mode.look = None
        way = self.plan.ways.get(layer)
        if way is not None and way.inline:
            self.mode.await_softmax(
                seen.k.shape[2], lambda logits, product: self._take(layer, FromSoftmax(seen, logits, product))
            )

    def called(self, layer: int, shown: Attended) -> None:
        """A call of attention is over."""
        way = self.plan.ways.get(layer)
        if way is not None and not way.inline:
            self._take(layer, FromCall(Call.of(shown), way.ungrouped))

    def end(self) -> None:
        """The forward is over: what was compared holds for texts of this length."""
        self.plan.proven = max(self.plan.proven, self.batch.seq_len)

    def _take(self, layer: int, scores: Scores) -> None:
        started = time.perf_counter()
        columns = self._computed(layer, scores)
        self.seconds += time.perf_counter() - started
        self._keeper.keep_statistics(layer, columns)

    def _computed(self, layer: int, scores: Scores) -> Float32[Tensor, "picks heads width"]:
        if self.batch.seq_len > len(self.plan.buckets):
            raise CaptureError(
                f"a document has {self.batch.seq_len:,} tokens, and rows of attention have columns for "
                f"{len(self.plan.buckets):,}: set dataset.max_tokens"
            )
        rows, heads, tokens = scores.q.shape[:3]
        if (rows, tokens) != (self.batch.n_rows, self.batch.seq_len):
            raise CaptureError(
                f"layer {layer} attends with {rows} x {tokens} queries, wanted one for each of "
                f"{self.batch.n_rows} x {self.batch.seq_len} tokens: leave it out of capture.layers"
            )
        picks, device = self._keeper.picks[draw_of((layer, ATTENTION))], scores.q.device
        index, texts = self._keeper.index(layer, ATTENTION, device), []
        bounds = np.searchsorted(picks.rows, np.arange(self.batch.n_rows + 1))
        for row, (first, last) in enumerate(pairwise(bounds.tolist())):
            if first < last:
                at = index[first:last] - row * self.batch.seq_len
                queries = Queries(row, picks.positions[first:last], at)
                if self._proves and row == self._longest:
                    require_proven(layer, scores, queries.some(PROVEN_QUERIES))
                texts.append(of_text(scores, queries, self.plan, self._sections.of(row, device)))
        if not texts:
            return torch.empty(0, heads, self.plan.layout.width(scores.v.shape[-1]), device=device)
        return torch.cat(texts)


def of_text(
    scores: Scores, queries: Queries, plan: AttentionPlan, sections: BucketRuns | None
) -> Float32[Tensor, "picks heads width"]:
    """Statistics of picked queries of one text, all heads; `sections` are where its named ones lie."""
    runs = plan.runs(queries.index.device)
    by_head: dict[int, list[Tensor]] = {}
    for one in scores.slices(queries):
        columns = statistics(one, queries.index[one.picks], plan.layout, runs, sections)
        by_head.setdefault(one.heads.start, []).append(columns)
    return torch.cat([torch.cat(pieces, 1) for pieces in by_head.values()]).transpose(0, 1)
