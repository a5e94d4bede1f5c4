"""Bars while something runs, on a terminal; plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from sniffer.words import duration, printable, size

log = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 10.0


@dataclass
class CaptureProgress:
    """Follows a capture: documents, tokens per second, vectors, memory, time left.

    Time left goes by tokens, of which `total_tokens` are expected.
    """

    total_documents: int
    total_tokens: float
    bar: Progress | None = None
    documents: int = 0
    tokens: int = 0
    vectors: int = 0

    def __post_init__(self) -> None:
        self.started = self.last_line = time.perf_counter()
        self.task: TaskID | None = None
        if self.bar is not None:
            self.task = self.bar.add_task("capturing", total=self.total_tokens, **self._fields())

    def advance(self, documents: int, tokens: int, vectors: int) -> None:
        """Reports that `documents` more are done; `vectors` is the new total."""
        self.documents += documents
        self.tokens += tokens
        self.vectors = vectors
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.tokens, **self._fields())
        elif time.perf_counter() - self.last_line >= LOG_EVERY_SECONDS:
            self.last_line = time.perf_counter()
            log.info("%s", self._line())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, time.perf_counter() - self.started)

    def _fields(self) -> dict[str, Any]:
        return {
            "documents": f"{self.documents}/{self.total_documents} documents",
            "rate": f"{self.tokens_per_second:,.0f} tokens/s",
            "vectors": f"{self.vectors:,} vectors",
            "ram": f"{size(psutil.Process().memory_info().rss)} RAM",
            "left": self._left(),
        }

    def _left(self) -> str:
        if not self.tokens:
            return "time left unknown"
        return f"about {duration((self.total_tokens - self.tokens) / self.tokens_per_second)} left"

    def _line(self) -> str:
        return ", ".join(self._fields().values())


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """A spinner while something takes its time, on a terminal; nothing elsewhere."""
    console = rich.get_console()
    with console.status(Text(printable(what))) if console.is_terminal else nullcontext():
        yield


@contextmanager
def capture_progress(total_documents: int, total_tokens: float) -> Iterator[CaptureProgress]:
    """A live bar on a terminal; elsewhere a log line every ten seconds."""
    console = rich.get_console()
    if not console.is_terminal:
        yield CaptureProgress(total_documents, total_tokens)
        return
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        *(TextColumn("{task.fields[" + name + "]}") for name in ("documents", "rate", "vectors", "ram", "left")),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield CaptureProgress(total_documents, total_tokens, bar)


@contextmanager
def write_progress(parts: int) -> Iterator[Callable[[], None]]:
    """A bar over the parts to write, on a terminal; call what it yields after each part."""
    console = rich.get_console()
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("writing"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("writing", total=parts)
        yield lambda: bar.advance(task)
