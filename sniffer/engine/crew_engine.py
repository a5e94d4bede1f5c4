"""An engine whose model is with a crew of workers; what runs them is left to a subclass (ray.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from sniffer.config.schema import Config
from sniffer.dataset.feed import Feed
from sniffer.engine.base import Plan
from sniffer.engine.crew import Crew
from sniffer.engine.pool import Pool
from sniffer.engine.worker import Facts
from sniffer.errors import CaptureError
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.estimate import Room
from sniffer.process.clock import Clock
from sniffer.process.stop import Stop
from sniffer.storage.same_run import differences
from sniffer.storage.store import Store


class CrewEngine(ABC):
    """An engine whose model is with a crew; a subclass says where the workers come from.

    `per_node`: as many workers share one machine's memory.
    """

    def __init__(self, size: int, per_node: int, start_timeout: float) -> None:
        self.size = size
        self.per_node = per_node
        self.start_timeout = start_timeout
        self._crew: Crew | None = None

    @abstractmethod
    def pool(self, config: Config, folder: Path) -> Pool:
        """Of workers that load the configured model, and write into the run folder."""

    def open(self, config: Config, folder: Path) -> Facts:
        """Has workers load the model; the first one to have it tells what it is.

        Raises:
            CaptureError: its checkpoint is not the one that this process sees; or as `Crew.open`.
        """
        self._crew = Crew(self.pool(config, folder), self.size, self.start_timeout)
        facts = self._crew.open()
        if found := differences({"model": config.model.describe()}, {"model": facts.model}):
            raise CaptureError(f"a worker has another checkpoint than this process: {'; '.join(found)}")
        return facts

    def room(self, wanted: int | None) -> Room:
        """Of one worker: an equal share of what its machine has left when all have their models."""
        available = max(0, self._model.available - (self.per_node - 1) * self._model.resident)
        return Room.of(available / self.per_node, wanted, self._model.device)

    def device(self) -> dict[str, str]:
        return dict(self._model.described)

    def threads(self) -> int:
        return self._model.threads

    def infer(self, plan: Plan, feed: Feed, store: Store, clock: Clock, stop: Stop) -> None:
        assert self._crew is not None
        self._crew.infer(plan, feed, store, clock, stop)

    def commit(self, plan: Plan, store: Store, *, last: bool) -> None:
        """After an interruption, what workers hold is written; then the run folder is put in order."""
        assert self._crew is not None
        if not last:
            self._crew.finish(store, Clock())
        self._crew.close()
        store.commit(Accumulator(plan.selection), last=last)
        store.tidy()

    def close(self) -> None:
        if self._crew is not None:
            self._crew.close()

    @property
    def _model(self) -> Facts:
        assert self._crew is not None and self._crew.model is not None
        return self._crew.model
