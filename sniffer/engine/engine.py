"""An engine: what brings up the workers of a run. Where they come from, a subclass says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from sniffer.config.schema import Config
from sniffer.engine.crew import Crew
from sniffer.engine.facts import Facts
from sniffer.engine.pool import Pool
from sniffer.errors import CaptureError
from sniffer.forward.estimate import Room
from sniffer.storage.same_run import differences


class Engine(ABC):
    """Brings up a crew, and gives back what it borrowed.

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
            SnifferError: as `Checkpoint.load`.
        """
        self._crew = Crew(self.pool(config, folder), self.size, self.start_timeout)
        facts = self._crew.open()
        if found := differences({"model": config.model.describe()}, {"model": facts.model}):
            raise CaptureError(f"a worker has another checkpoint than this process: {'; '.join(found)}")
        return facts

    @property
    def crew(self) -> Crew:
        """The workers, once `open` has brought them up."""
        assert self._crew is not None
        return self._crew

    def room(self, facts: Facts, wanted: int | None) -> Room:
        """What the captured rows of one worker may take: a share of what its machine has left when all have models.

        Args:
            wanted: output.memory_limit.
        """
        available = max(0, facts.available - (self.per_node - 1) * facts.resident)
        return Room.of(available / self.per_node, wanted, facts.device)

    def close(self) -> None:
        """Gives back what was borrowed."""
        if self._crew is not None:
            self._crew.close()
