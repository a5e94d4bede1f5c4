"""What a person sees: a bar while it runs, plain log lines where there is no terminal, tables at the end."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import rich
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sniffer.config import OWN_CLUSTER
from sniffer.estimate import Estimate, size
from sniffer.finite import NotFinite
from sniffer.manifest import INSIDE_INFERENCE, Manifest
from sniffer.printing import Grid, printable, say
from sniffer.sampler import Picker

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


def estimate_line(expected: Estimate) -> str:
    about = "" if expected.exact_lengths else "about "
    kinds = ", ".join(f"{kind} {rows:,.0f}" for kind, rows in expected.rows.items())
    return (
        f"expecting {about}{expected.vectors:,.0f} vectors ({kinds}): "
        f"{size(expected.ram_bytes)} of RAM, {size(expected.file_bytes)} on disk"
    )


def resume_line(folder: Path, manifest: Manifest) -> str:
    """How to go on with a run that was stopped."""
    documents = f"{manifest.examples.rows:,}" if manifest.examples else "no"
    command = ["python", "-m", "sniffer.runs", "resume", str(folder)]
    engine = manifest.config.get("engine")
    address = engine.get("address") if isinstance(engine, Mapping) else None
    if address not in OWN_CLUSTER:
        command += ["--engine-address", str(address)]
    return f"{documents} documents are kept; to go on: {shlex.join(command)}"


TABLE_WIDTH = 180
"""Of tables with many columns that go to a file or a pipe, where nobody's terminal breaks them."""


def show_table(table: Table) -> None:
    """Prints a table for people, as wide as it needs to be where there is no terminal."""
    console = rich.get_console()
    (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(table)


MAX_BUCKET_LINES = 24


def show_summary(folder: Path, manifest: Manifest, picker: Picker) -> None:
    """Prints what a run captured, by kind and bucket, and the folder, which stands alone on the last line."""
    console = rich.get_console()
    with console.capture() as whole:
        console.print(_facts_table(manifest))
        console.print(_bucket_table(manifest, picker))
        if manifest.not_finite:
            say(f"warning: {not_finite_line(manifest)}", style="yellow")
        say(folder, style="bold")
    # In one piece: jobs of a sweep may share the terminal.
    console.file.write(whole.get())
    console.file.flush()


def _facts_table(manifest: Manifest) -> Table:
    table = Grid(title="captured", show_header=False)
    table.add_column(style="cyan")
    table.add_column()
    for name, value in _facts(manifest).items():
        table.add_row(name, value)
    return table


def _facts(manifest: Manifest) -> dict[str, str]:
    counts, seconds = manifest.counts, manifest.timings
    layers = list(manifest.selection)
    rate = counts["tokens"] / max(1e-9, seconds["inference"])
    return {
        "documents": f"{counts['examples']:,} ({counts['truncated']:,} truncated, "
        f"{counts['skipped_empty']:,} empty ones skipped), {counts['tokens']:,} tokens",
        "layers": f"{len(layers)} of {len(manifest.geometry)}",
        "vectors": f"{manifest.rows:,} in {len(manifest.parts)} files, {size(manifest.bytes)}",
        "seconds": _stages(seconds),
        # The seconds of a session that was killed are not known.
        **({} if manifest.resumes else {"speed": f"{rate:,.0f} tokens/s"}),
        "digest": manifest.digest,
    }


SHOWN = 6
"""Layers that a line names."""


def not_finite_line(manifest: Manifest) -> str:
    """How many vectors hold a number that is not finite, and of which layers and kinds."""
    found = manifest.not_finite
    if not found:
        return "none" if manifest.counts_not_finite else "unknown: an early release did not count"
    total = sum((one for kinds in found.values() for one in kinds.values()), NotFinite())
    layers = [f"layer {layer} {_kinds(kinds)}" for layer, kinds in found.items()]
    more = f"; and {len(layers) - SHOWN} more layers" if len(layers) > SHOWN else ""
    return f"of {manifest.rows:,} vectors {total}: {'; '.join(layers[:SHOWN])}{more}"


def _kinds(kinds: Mapping[str, NotFinite]) -> str:
    return ", ".join(f"{kind} ({found})" for kind, found in kinds.items())


def _stages(seconds: Mapping[str, float]) -> str:
    inside = ", ".join(f"{stage} {seconds[stage]:.2f}" for stage in INSIDE_INFERENCE if stage in seconds)
    outer = {stage: value for stage, value in seconds.items() if stage not in INSIDE_INFERENCE}
    return ", ".join(
        f"{stage} {value:.1f}" + (f" ({inside})" if stage == "inference" and inside else "")
        for stage, value in outer.items()
    )


def _bucket_table(manifest: Manifest, picker: Picker) -> Table:
    rows = rows_by_bucket(manifest)
    table = Grid(title="vectors by bucket", show_footer=True)
    table.add_column("bucket", "total", justify="right")
    table.add_column("positions", justify="right")
    for kind, total in manifest.rows_by_kind.items():
        table.add_column(kind, f"{total:,}", justify="right")
    shown, rest = list(rows)[:MAX_BUCKET_LINES], list(rows)[MAX_BUCKET_LINES:]
    for bucket in shown:
        first, last = picker.span(bucket)
        table.add_row(str(bucket), f"{first:,} to {last:,}", *(f"{n:,}" for n in rows[bucket].values()))
    if rest:
        sums = (sum(rows[bucket][kind] for bucket in rest) for kind in manifest.rows_by_kind)
        table.add_row(f"{len(rest)} more", f"to {picker.span(rest[-1])[1]:,}", *(f"{n:,}" for n in sums))
    return table


def rows_by_bucket(manifest: Manifest) -> dict[int, dict[str, int]]:
    """Rows by bucket, then kind; every kind in every bucket, in ascending order of buckets."""
    rows = {bucket: dict.fromkeys(manifest.rows_by_kind, 0) for bucket in manifest.rows_by_bucket}
    for part in manifest.parts:
        for bucket, count in part.buckets.items():
            rows[bucket][part.kind] += count
    return rows


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
