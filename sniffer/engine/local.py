"""The model in this process: what `engine=local` is. One worker, which does what it is called for at once.

Only what it spills, it writes while it does other things: threads are at it, and the call has ended when they have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sniffer.config.schema import Config
from sniffer.engine.engine import Engine
from sniffer.engine.generating import loaded_by
from sniffer.engine.model_cache import Load
from sniffer.engine.worker import Worker
from sniffer.storage.part_writer import Writing
from sniffer.terminal.progress import write_progress


class LocalEngine(Engine):
    """Runs every batch here, one after the other.

    `load` is how to come by the model; jobs of a sweep hand it on.
    """

    def __init__(self, load: Load) -> None:
        super().__init__(size=1, per_node=1, start_timeout=math.inf)
        self._load = load

    def pool(self, config: Config, folder: Path) -> LocalPool:
        return LocalPool(lambda: Worker(loaded_by(config), folder, load=self._load, progress=write_progress))


@dataclass(frozen=True, eq=False)
class Answered:
    """A call that was done as it was made; the ticket for its own answer."""

    answer: Any = None
    error: Exception | None = None


@dataclass(frozen=True, eq=False)
class Spilling:
    """A call that threads are at."""

    worker: Worker
    writing: Writing


class LocalPool:
    """Workers in this process; `sniffer.engine.pool.Pool`. A signal that stops a call at once goes through."""

    may_lose = False

    def __init__(self, make: Callable[[], Worker]) -> None:
        self._make = make

    def hire(self) -> Worker:
        return self._make()

    def call(self, worker: Any, method: str, *arguments: Any) -> Answered | Spilling:
        try:
            if method == "spill":
                return Spilling(worker, worker.begin_flush(*arguments))
            return Answered(getattr(worker, method)(*arguments))
        except Exception as error:
            return Answered(error=error)

    def wait(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        until = time.monotonic() + seconds
        while True:
            ended = [ticket for ticket in tickets if not isinstance(ticket, Spilling) or ticket.writing.done]
            left = until - time.monotonic()
            if ended or not tickets or left <= 0:
                return ended
            tickets[0].writing.wait(left)

    def result(self, ticket: Any) -> Any:
        if isinstance(ticket, Spilling):
            return ticket.worker.end_flush()
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer

    def dismiss(self, worker: Any) -> None:
        """The worker and its model go with the last who holds them; parts that are not begun are not written."""
        if worker.leaving is not None:
            worker.leaving.writing.stop()
