"""`runs list`: a table of all runs and sweeps below a folder."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import rich.box
from rich.table import Table

from sniffer.errors import RunError
from sniffer.estimate import size
from sniffer.manifest import Manifest
from sniffer.runs.folders import run_folders, state

COLUMNS = ("run", "model", "sampler", "status", "documents", "vectors", "bytes", "age")


def table(place: Path) -> Table:
    """One line per run; the jobs of a sweep below the line of their sweep.

    Raises:
        RunError: there is no run below `place`.
    """
    runs = run_folders(place)
    if not runs:
        raise RunError(f"no run below {place}: name the folder that runs were written to")
    grid = Table(box=rich.box.SIMPLE)
    for name in COLUMNS:
        grid.add_column(name, justify="right" if name in COLUMNS[4:] else "left", no_wrap=True)
    sweep = None
    for folder in runs:
        # A sweep numbers its jobs.
        if folder.name.isdecimal() and folder != place:
            if folder.parent != sweep:
                sweep = folder.parent
                jobs = sum(other.parent == sweep for other in runs)
                grid.add_row(f"{_name(sweep, place)} (sweep of {jobs})")
            grid.add_row(*_cells(folder, f"  {folder.name}"))
        else:
            grid.add_row(*_cells(folder, _name(folder, place)))
    return grid


def _name(folder: Path, place: Path) -> str:
    return folder.name if folder == place else folder.relative_to(place).as_posix()


def _cells(folder: Path, name: str) -> Iterator[str]:
    yield name
    try:
        manifest = Manifest.load(folder, parts_must_exist=False)
    except RunError as error:
        yield f"cannot be read: {str(error).split(';')[0]}"
        return
    yield str(manifest.model.get("checkpoint", "?")).rstrip("/").rpartition("/")[2]
    yield sampler_of(manifest)
    yield state(folder, manifest)
    yield f"{manifest.examples.rows if manifest.examples else 0:,}"
    yield f"{manifest.rows:,}"
    yield size(manifest.bytes)
    yield age(manifest.created)


def sampler_of(manifest: Manifest) -> str:
    """The sampler's class and its numbers, such as LogUniform(1.0, 128)."""
    name = str(manifest.sampler.get("_target_", "?")).rpartition(".")[2]
    numbers = [str(value) for value in manifest.sampler.values() if isinstance(value, int | float)]
    return f"{name}({', '.join(numbers)})"


def age(created: str) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"
