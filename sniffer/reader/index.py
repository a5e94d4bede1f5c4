"""The index of a sweep: sweep.parquet, a row per job, which says how each one stands.

A row is read off the job's folder (its overrides, its manifest, whether a process holds it), so that the index
can be made again at any time; only what a job failed of stands nowhere else. Whoever runs a job replaces
the index when it begins and when it ends, one process at a time.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from sniffer.errors import RunError, first_line
from sniffer.reader.folders import state
from sniffer.reader.index_file import read_index
from sniffer.reader.job_folders import job_names
from sniffer.storage.durable import durable_file
from sniffer.storage.layout import RunFolder, SweepFolder
from sniffer.storage.lock import hold, is_held
from sniffer.storage.manifest import Manifest
from sniffer.storage.ownership import is_run
from sniffer.storage.untrusted import read_yaml

FACTS = {"status": pl.String, "rows": pl.Int64, "bytes": pl.Int64, "seconds": pl.Float64, "error": pl.String}
"""Columns of the index between the overrides and `path`."""
LARGEST_INTEGER = (1 << 63) - 1
"""Of a column; seeds may be larger."""


@dataclass(frozen=True)
class Job:
    """One job of a sweep, as its folder shows it.

    Attributes:
        name: of its folder, below that of the sweep.
        overrides: key -> value, as typed.
        status: complete, interrupted, running, killed (nobody holds it, but it did not end), or failed, of
            `error`.
        rows, bytes, seconds: of its manifest; None before it has one.
    """

    name: str
    overrides: Mapping[str, str]
    status: str
    rows: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    error: str | None = None


def read_job(sweep: Path, name: str, error: str | None = None) -> Job:
    """How a job stands; `error` is what it failed of, if it did.

    Raises:
        RunError: its list of overrides cannot be read.
    """
    folder = sweep / name
    overrides = overrides_of(folder)
    if not is_run(folder):
        unfinished = "running" if is_held(folder) else "killed"
        return Job(name, overrides, "failed" if error else unfinished, error=error)
    try:
        manifest, _ = Manifest.recover(folder)
    except RunError as broken:
        return Job(name, overrides, "failed", error=error or str(broken))
    status = "failed" if error else state(folder, manifest)
    return Job(name, overrides, status, manifest.rows, manifest.bytes, manifest.seconds, error)


def read_jobs(sweep: Path, news: Mapping[str, str | None] | None = None) -> list[Job]:
    """All jobs that were begun, in order.

    Args:
        news: what jobs failed of (None: they did not), where the index does not know it yet.

    Raises:
        RunError: the index or a job's list of overrides cannot be read.
    """
    failed = errors(sweep) | dict(news or {})
    names = job_names(sweep, lambda folder: failed if folder == sweep else errors(folder))
    return [read_job(sweep, name, failed.get(name)) for name in names]


def table(jobs: Sequence[Job]) -> pl.DataFrame:
    """One row per job: job, its overrides as columns, status, rows, bytes, seconds, error, path (its folder's name)."""
    facts = {name: pl.Series(name, [getattr(job, name) for job in jobs], kind) for name, kind in FACTS.items()}
    path = pl.Series("path", [job.name for job in jobs], pl.String)
    return override_columns({job.name: job.overrides for job in jobs}).with_columns(**facts, path=path)


def update(sweep: Path, job: str | None = None, error: str | None = None) -> pl.DataFrame:
    """Makes the index again from the jobs' folders, and returns it.

    Args:
        job: the one that began or ended just now; `error` is what it failed of, None if it did not.

    Raises:
        RunError: the folder cannot be written to, or a job's list of overrides cannot be read.
        CaptureError: the disk is full.
    """
    with hold(sweep, wait=True):
        index = table(read_jobs(sweep, {} if job is None else {job: error}))
        buffer = io.BytesIO()
        index.write_parquet(buffer)
        with durable_file(sweep / SweepFolder.INDEX) as file:
            file.write(buffer.getvalue())
    return index


def errors(sweep: Path) -> dict[str, str | None]:
    """The jobs that the index names, and what each failed of, if it did; nothing where there is no index.

    Raises:
        RunError: the index cannot be read.
    """
    path = sweep / SweepFolder.INDEX
    if not path.exists():
        return {}
    try:
        return read_index(path)
    except (OSError, ValueError) as error:
        raise RunError(f"could not read {path}: {first_line(error)}; remove it: the next job makes it again") from error


def jobs_without_results(sweep: Path) -> list[str]:
    """What became of jobs that were begun and have no run, one line each; nothing outside a sweep.

    Raises:
        RunError: the index or a job's list of overrides cannot be read.
    """
    gone = [
        f"job {name} is missing: {SweepFolder.INDEX} names it" for name in errors(sweep) if not (sweep / name).is_dir()
    ]
    begun = [job for job in read_jobs(sweep) if job.rows is None] if (sweep / SweepFolder.INDEX).exists() else []
    return gone + [
        f"job {job.name} has no results: {job.status}" + (f" ({job.error})" if job.error else "") for job in begun
    ]


def overrides_of(job: Path) -> dict[str, str]:
    """What a job of a Hydra sweep overrode: key -> value, as typed; empty outside Hydra.

    Raises:
        RunError: the job's list of overrides cannot be read.
    """
    path = job / RunFolder.OVERRIDES
    if not path.exists():
        return {}
    try:
        entries = [str(entry) for entry in read_yaml(path) or ()]
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise RunError(f"could not read {path}: {first_line(error)}; restore the file") from error
    split = (entry.lstrip("+~").partition("=") for entry in entries)
    return {key: value for key, _, value in split}


def override_columns(overrides: Mapping[str, Mapping[str, str]]) -> pl.DataFrame:
    """One row per job: job and what it overrode, typed where all jobs' values allow."""
    keys = dict.fromkeys(key for one in overrides.values() for key in one)
    columns = {key: typed([one.get(key) for one in overrides.values()]) for key in keys}
    return pl.DataFrame({"job": pl.Series(list(overrides), dtype=pl.String), **columns})


def swept(jobs: pl.DataFrame) -> list[str]:
    """The overridden keys whose value is not the same in all jobs."""
    keys = jobs.columns[1 : jobs.columns.index(next(iter(FACTS)))]
    return [key for key in keys if jobs[key].n_unique() > 1]


def typed(texts: Sequence[str | None]) -> list[Any]:
    """Values of one key over all jobs: integers, floats or booleans if all of them read so, else text.

    Text too, where an integer does not fit a column: as a float it would be another number.
    """
    readers: tuple[Callable[[str], Any], ...] = (_integer, float, _boolean)
    for read in readers:
        try:
            return [None if text is None else read(text) for text in texts]
        except ValueError:
            continue
        except OverflowError:
            break
    return list(texts)


def _integer(text: str) -> int:
    if abs(value := int(text)) > LARGEST_INTEGER:
        raise OverflowError(text)
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
