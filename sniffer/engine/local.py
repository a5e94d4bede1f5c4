"""The model in this process: what `engine=local` is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from sniffer.config.schema import Config
from sniffer.dataset.feed import Feed
from sniffer.engine.base import Plan, describe_device
from sniffer.engine.model_cache import Load
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.estimate import Room
from sniffer.forward.observer import draw
from sniffer.forward.passes import Passes
from sniffer.process.clock import Clock
from sniffer.process.memory import available_memory, keep_freed_memory
from sniffer.process.stop import Stop, Stopped
from sniffer.storage.store import Store
from sniffer.terminal.progress import capture_progress
from sniffer.types import Backbone


class LocalEngine:
    """Runs every batch here, one after the other.

    `load` is how to come by the model; jobs of a sweep hand it on.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._backbone: Backbone | None = None
        self._accumulator: Accumulator | None = None

    def open(self, config: Config, folder: Path) -> Backbone:
        """Loads the model; SnifferError as `Checkpoint.load`."""
        self._backbone = self._load(config.model)
        keep_freed_memory(self._backbone.device)
        return self._backbone

    def room(self, wanted: int | None) -> Room:
        assert self._backbone is not None
        return Room.of(available_memory(), wanted, self._backbone.device)

    def device(self) -> dict[str, str]:
        assert self._backbone is not None
        return describe_device(self._backbone)

    def threads(self) -> int:
        return torch.get_num_threads()

    def infer(self, plan: Plan, feed: Feed, store: Store, clock: Clock, stop: Stop) -> None:
        """Runs every batch through the backbone; what was picked is then in memory, or on disk."""
        assert self._backbone is not None
        accumulator = self._accumulator = Accumulator(plan.selection)
        passes = Passes(self._backbone, plan.selection, accumulator, clock)

        def keep(leave: int = 0) -> None:
            for batch in passes.settle(leave):
                store.add_examples(batch.documents)
                progress.advance(len(batch.documents), batch.n_tokens, sum(accumulator.rows.values()))

        with capture_progress(feed.expected_documents, feed.expected_tokens) as progress:
            try:
                for batch in stop.each(feed.batches(plan.batch_tokens, plan.lengths)):
                    with clock.stage("sample"):
                        picks = draw(plan.picker, plan.selection, batch)
                    if not store.kept.lacks(batch, picks, plan.selection.heads):
                        store.add_examples(batch.documents)
                        progress.advance(len(batch.documents), batch.n_tokens, sum(accumulator.rows.values()))
                        continue
                    passes.run(batch, picks, store.kept.done(batch, plan.selection.heads))
                    keep(leave=1)
                    with clock.stage("commit"):
                        store.relieve(accumulator)
            except (Exception, Stopped):
                # Batches that are through the model are kept, if that is still possible.
                with suppress(Exception):
                    keep()
                raise
            keep()

    def commit(self, plan: Plan, store: Store, *, last: bool) -> None:
        """Writes what is in memory still."""
        store.commit(self._accumulator or Accumulator(plan.selection), last=last)

    def close(self) -> None:
        """Nothing to give back: the model goes with this object."""
