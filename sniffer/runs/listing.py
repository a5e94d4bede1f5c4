"""`runs list`: a table of all runs and sweeps below a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from sniffer.errors import RunError, first_line
from sniffer.reader.folders import state
from sniffer.reader.index import read_jobs
from sniffer.reader.job_folders import in_order, run_folders, sweep_folders
from sniffer.sampler import SIDES
from sniffer.storage.away import away
from sniffer.storage.manifest import Manifest
from sniffer.terminal.printing import Grid
from sniffer.words import size

LONGEST = 40
"""Characters of a cell, so that the names of folders have room; `inspect` tells all of it."""
COLUMNS = ("run", "model", "sampler", "status", "documents", "vectors", "bytes", "age")


def table(place: Path) -> Table:
    """One line per run; the jobs of a sweep below the line of their sweep.

    What cannot be read has a line that says so, and hides nothing else.

    Raises:
        RunError: there is no run below `place`.
    """
    sweeps = {sweep: list(_sweep(sweep, place)) for sweep in sweep_folders(place)}
    jobs = {folder for lines in sweeps.values() for folder, _ in lines}
    lines = {run: [(run, _cells(run, _name(run, place)))] for run in run_folders(place) if run not in jobs} | sweeps
    if not any(lines.values()):
        raise RunError(f"no run below {place}: name the folder that runs were written to")
    grid = Grid()
    for name in COLUMNS:
        grid.add_column(name, justify="right" if name in COLUMNS[4:] else "left", no_wrap=True)
    named = {str(folder): cells for folder, cells in lines.items()}
    for folder in in_order(named):
        for _, cells in named[folder]:
            grid.add_row(*cells)
    return grid


Line = tuple[Path, list[str]]
"""A folder and its cells."""


def _sweep(sweep: Path, place: Path) -> Iterator[Line]:
    """The line of a sweep and those of its jobs; nothing of a sweep that has begun no job."""
    try:
        jobs = read_jobs(sweep)
    except RunError as error:
        yield sweep, [_name(sweep, place), _unreadable(error, sweep)]
        return
    empty = sum(job.rows is None for job in jobs)
    without = f", {empty} without results" if empty else ""
    if jobs:
        yield sweep, [f"{_name(sweep, place)} (sweep of {len(jobs)}{without})"]
    for job in jobs:
        folder, name = sweep / job.name, f"  {job.name}"
        yield folder, [name, "", "", job.status] if job.rows is None else _cells(folder, name)


def _name(folder: Path, place: Path) -> str:
    return folder.name if folder == place else folder.relative_to(place).as_posix()


def _cells(folder: Path, name: str) -> list[str]:
    try:
        return [name, *map(_short, _facts(folder, Manifest.load(folder, parts_must_exist=False)))]
    except Exception as error:  # a manifest may come from anywhere
        return [name, _unreadable(error, folder)]


def _unreadable(error: Exception, folder: Path) -> str:
    """Why, as far as it fits beside the folder's name."""
    kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
    why = first_line(error).split(";")[0].replace(f"{folder}/", "")
    return f"cannot be read: {_short(f'{kind}{why}', 60)}"


def _short(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _facts(folder: Path, manifest: Manifest) -> Iterator[str]:
    yield model_of(manifest)
    yield sampler_of(manifest)
    yield f"{state(folder, manifest)}{', rows at its mirror' if away(folder, manifest) else ''}"
    yield f"{manifest.examples.rows if manifest.examples else 0:,}"
    yield f"{manifest.rows:,}"
    yield size(manifest.bytes)
    yield age(manifest.created)


def model_of(manifest: Manifest) -> str:
    """The last part of the checkpoint's name, and whether its weights are not the checkpoint's."""
    name = str(manifest.model.get("checkpoint", "?")).rstrip("/").rpartition("/")[2]
    if manifest.model.get("weights") != "random":
        return name
    return f"random {name}, default shape" if manifest.model.get("geometry") == "default" else f"random {name}"


def sampler_of(manifest: Manifest) -> str:
    """The sampler's class and its numbers, such as LogUniform(1.0, 128); where each side has one, both."""
    return _sampler_of(manifest.sampler)


def _sampler_of(sampler: Mapping[str, Any]) -> str:
    sides = [f"{side} {_sampler_of(sampler[side])}" for side in SIDES if isinstance(sampler.get(side), Mapping)]
    if sides:
        return ", ".join(sides)
    name = str(sampler.get("_target_", "?")).rpartition(".")[2]
    numbers = [str(value) for value in sampler.values() if isinstance(value, int | float)]
    return f"{name}({', '.join(numbers)})"


def age(created: str) -> str:
    """How long ago, in the largest unit that fits."""
    then = datetime.fromisoformat(created)
    seconds = (datetime.now(UTC) - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"
