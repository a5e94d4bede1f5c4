"""Forward passes: the picked rows of each batch, from the model into the accumulator.

Rows are kept one batch late, so that the copies of one batch to the host overlap the next forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from sniffer.forward.accumulator import NOTHING, Accumulator
from sniffer.forward.attention.attending import AttentionPlan
from sniffer.forward.generation.difference import difference
from sniffer.forward.generation.live import Live, LiveRows, Places
from sniffer.forward.moments.counting import MomentsPlan, Totals
from sniffer.forward.observer import Observer, Wanted
from sniffer.forward.selection import Selection
from sniffer.forward.transfer import BlockingTransfer, transfer_for
from sniffer.process.clock import Clock
from sniffer.types import KIND, MOMENTS, Backbone, Caching, Difference, Document, Picks, TokenBatch, by_number


class Passes:
    """One model at work.

    `clock` gets the seconds of `forward`, and of `capture`, the part of it that is ours. `totals` are the moments of
    all batches that are settled, where any are wanted.
    """

    def __init__(
        self,
        backbone: Backbone,
        selection: Selection,
        accumulator: Accumulator,
        clock: Clock,
        attention: AttentionPlan | None = None,
        moments: MomentsPlan | None = None,
    ) -> None:
        self.backbone = backbone
        self.accumulator = accumulator
        self.clock = clock
        self.transfer = transfer_for(backbone.device)
        layers = backbone.geometry if attention is None else map(attention.layout.of_layer, backbone.geometry)
        geometry = by_number(layers)
        self._plan = Wanted(selection, geometry, backbone.layer_of, self.transfer, backbone.device, attention, moments)
        self.attention = attention
        self.totals = None if moments is None else Totals(moments)
        self._plain = Wanted(selection, geometry, backbone.layer_of, BlockingTransfer(), backbone.device)
        self._geometry = geometry
        self._wants_pre = selection.wants_pre
        self._in_flight: deque[tuple[Observer | LiveRows, Mapping[tuple[int, str], Collection[int]]]] = deque()

    @torch.inference_mode()
    def run(
        self,
        batch: TokenBatch,
        picks: Mapping[tuple[int, str], Picks],
        done: Mapping[tuple[int, str], Collection[int]] = NOTHING,
    ) -> None:
        """One batch through the model; its rows are kept by a later `settle`, but those that are `done` already."""
        observer = Observer(batch, picks, self._plan, done.get(MOMENTS, ()))
        with self.clock.stage("forward"), observer.open(pre=self._wants_pre):
            self.backbone(self.transfer.upload(batch.input_ids(), self.backbone.device))
        self.transfer.end_batch()
        self._in_flight.append((observer, done))

    def live(
        self,
        prompts: TokenBatch,
        possible: Mapping[tuple[int, str], Places],
        longest: Sequence[Document] = (),
        done: Mapping[tuple[int, str], Collection[int]] = NOTHING,
        caching: Caching = Caching(),  # noqa: B008 - it is frozen
    ) -> Live:
        """What gathers while a model goes on with these prompts, at places that may be kept.

        Args:
            longest: the documents as long as they may become.
            done: what need not be kept; here it matters of moments.
            caching: how prompts come in, and where in a cache new tokens are.
        """
        more = longest, done.get(MOMENTS, ()), caching
        return Live(prompts, possible, self._plan, *more, pre=self._wants_pre)

    def take(self, rows: LiveRows, done: Mapping[tuple[int, str], Collection[int]] = NOTHING) -> None:
        """Rows that were gathered live; they are kept by a later `settle`, but those that are `done` already."""
        rows.vectors = {pair: self.transfer.download(vectors) for pair, vectors in rows.vectors.items()}
        self.transfer.end_batch()
        self._in_flight.append((rows, done))

    @torch.inference_mode()
    def apart(self, rows: LiveRows) -> dict[tuple[int, str], Difference]:
        """How far rows that were gathered live are from those of one forward over the whole documents."""
        observer = Observer(rows.batch, rows.picks, self._plain)
        with self.clock.stage("forward"), observer.open(pre=self._wants_pre):
            self.backbone(self._plain.transfer.upload(rows.batch.input_ids(), self.backbone.device))
        return {
            (layer, kind): difference(found, observer.vectors[layer, kind], self._geometry[layer].dims[kind])
            for (layer, kind), found in rows.vectors.items()
            if not KIND[kind].statistics
        }

    @torch.inference_mode()
    def settle(self, leave: int = 0) -> Iterator[TokenBatch]:
        """Keeps the rows of all batches but the `leave` last ones; yields each batch whose rows are now kept."""
        while len(self._in_flight) > leave:
            observer, done = self._in_flight.popleft()
            vectors = self.transfer.settle(observer.vectors)
            self.accumulator.add(observer.batch, observer.picks, vectors, done)
            if self.totals is not None and observer.counting is not None:
                self.totals.take(observer.counting)
            self.clock.add("capture", observer.seconds)
            yield observer.batch
