"""The model in this process: what `engine=local` is. One worker, which does what it is called for at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sniffer.config.schema import Config
from sniffer.engine.engine import Engine
from sniffer.engine.model_cache import Load
from sniffer.engine.worker import Worker
from sniffer.terminal.progress import write_progress


class LocalEngine(Engine):
    """Runs every batch here, one after the other.

    `load` is how to come by the model; jobs of a sweep hand it on.
    """

    def __init__(self, load: Load) -> None:
        super().__init__(size=1, per_node=1, start_timeout=math.inf)
        self._load = load

    def pool(self, config: Config, folder: Path) -> LocalPool:
        return LocalPool(lambda: Worker(config.model, folder, load=self._load, progress=write_progress))


@dataclass(frozen=True, eq=False)
class Answered:
    """A call that was done as it was made; the ticket for its own answer."""

    answer: Any = None
    error: Exception | None = None


class LocalPool:
    """Workers in this process; `sniffer.engine.pool.Pool`. A signal that stops a call at once goes through."""

    may_lose = False

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._make = make

    def hire(self) -> Worker:
        return self._make()

    def call(self, worker: Any, method: str, *arguments: Any) -> Answered:
        try:
            return Answered(getattr(worker, method)(*arguments))
        except Exception as error:
            return Answered(error=error)

    def wait(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        return tickets

    def result(self, ticket: Any) -> Any:
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer

    def dismiss(self, worker: Any) -> None:
        """Nothing to end: the worker and its model go with the last who holds them."""
