"""Which folders are the jobs of a sweep: the one place that says so.

A sweep is what Hydra began with -m; its folder has Hydra's multirun.yaml, and our index, sweep.parquet. Its jobs are
the folders that the index names and those that Hydra's own records show to be jobs, however deep hydra.sweep.subdir
has put them: not what verbs have put beside them, such as a job that was reproduced, published or run again.

Any other folder of runs is read the same way, such as one of shards made by separate commands: its jobs are all the
runs below it, each once. A copy of a run, as `publish --dry-run` makes it, is no second run; what `reproduce` made is
no run of its own either, but the proof of another.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sniffer.storage.layout import RunFolder, SweepFolder
from sniffer.storage.ownership import is_run
from sniffer.storage.remote import RemotePath
from sniffer.storage.untrusted import read_json, read_text

REPRODUCED = "_reproduced"
"""What it adds to the run's name, unless told otherwise."""

DEPTH = 4
"""Folders below the one that is searched: outputs/SWEEP/JOB, and some room."""


def is_sweep(folder: Path) -> bool:
    """Whether Hydra began a sweep here."""
    return _has(folder, SweepFolder.INDEX) or _has(folder, SweepFolder.MULTIRUN)


def _has(folder: Path, path: str) -> bool:
    """Where it cannot be told, as in someone else's folder, there is nothing for us."""
    with suppress(OSError):
        return (folder / path).exists()
    return False


Indexed = Callable[[Path], Collection[str]]
"""Which jobs the index of a sweep names, all of them below it, if it has one; the folders of some may be gone."""


def job_names(place: Path, indexed: Indexed) -> list[str]:
    """The jobs that were begun, with results or without, by their paths below `place`, in order.

    Raises:
        RunError: an index cannot be read.
    """
    named = indexed(place)
    below = {folder.relative_to(place).as_posix(): folder for folder in _begun(place, indexed)}
    if is_sweep(place):
        jobs = {name for name in named if (place / name).is_dir()}
        jobs |= {name for name, folder in below.items() if _is_job(folder)}
        if jobs:
            return in_order(jobs)
    return in_order(below.keys() - set(_counted_already(below)))


def run_folders(place: Path) -> list[Path]:
    """All folders with results at or below `place`, whether they are jobs or not, in order."""
    found = []
    for folder, below in _walk(place):
        if is_run(folder):
            found.append(folder)
            below.clear()
    return sorted(found, key=lambda run: [_number_first(part) for part in run.parts])


def sweep_folders(place: Path) -> list[Path]:
    """All sweeps at or below `place`, outermost first."""
    found = []
    for folder, below in _walk(place):
        if is_run(folder):
            below.clear()
        elif is_sweep(folder):
            found.append(folder)
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Hydra numbers its jobs: 10 comes after 9."""
    return sorted(names, key=lambda name: [_number_first(part) for part in name.split("/")])


def _number_first(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _walk(place: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders from the top, each with the names of those in it; who clears these does not go there.

    Hidden folders hold nothing that is finished.
    """
    for name, below, _ in place.walk() if isinstance(place, RemotePath) else os.walk(place):
        folder = name if isinstance(name, Path) else Path(name)
        below[:] = sorted(one for one in below if not one.startswith("."))
        if len(folder.relative_to(place).parts) >= DEPTH:
            below.clear()
        yield folder, below


def _begun(place: Path, indexed: Indexed) -> Iterator[Path]:
    """Folders below `place` in which a run was begun, with results or without; of a sweep further down, its jobs."""
    for folder, below in _walk(place):
        if folder == place:
            continue
        if is_run(folder) or _has(folder, RunFolder.OVERRIDES):
            below.clear()
            yield folder
        elif is_sweep(folder):
            below.clear()
            yield from (folder / name for name in job_names(folder, indexed))


def _is_job(folder: Path) -> bool:
    """Whether Hydra's record in a folder is of a job of a sweep, and not of a run of its own."""
    try:
        record = read_text(folder / RunFolder.HYDRA_OWN)
    except (OSError, ValueError):
        return _has(folder, RunFolder.OVERRIDES)
    return re.search(r"^  mode: RUN$", record, re.MULTILINE) is None


@dataclass(frozen=True)
class Identity:
    """What tells a run from every other one, and the digest of its rows; None where it cannot be read."""

    run: str | None = None
    digest: str | None = None

    @classmethod
    def of(cls, folder: Path) -> Identity:
        try:
            values = read_json(folder / RunFolder.MANIFEST)
            keys = ("created", "finished", "timings", "counts", "digest")
            return cls(json.dumps([values[key] for key in keys]), str(values["digest"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return cls()


def _counted_already(runs: Mapping[str, Path]) -> Iterator[str]:
    """Of runs by name, those of which another one is the original: copies, and what `reproduce` has made."""
    identities = {name: Identity.of(folder) for name, folder in runs.items()}
    digests = Counter(identity.digest for identity in identities.values())
    seen: set[str] = set()
    # The original is the one with Hydra's record, or the one whose name comes first.
    for name in sorted(runs, key=lambda name: (not _has(runs[name], RunFolder.OVERRIDES), name)):
        identity, repeated = identities[name], _reproduces(runs[name])
        original_is_there = digests[repeated] > (identity.digest == repeated) if repeated else False
        if identity.run in seen or original_is_there or _is_older_reproduction(name, runs):
            yield name
        elif identity.run is not None:
            seen.add(identity.run)


def _reproduces(run: Path) -> str | None:
    """The digest of the run that this one repeats, if `reproduce` has made it."""
    try:
        return read_text(run / RunFolder.REPRODUCES).strip() or None
    except (OSError, ValueError):
        return None


def _is_older_reproduction(name: str, runs: Mapping[str, Path]) -> bool:
    """Releases before this one left no mark."""
    stem = name.removesuffix(REPRODUCED)
    return stem != name and stem in runs and not _has(runs[name], RunFolder.OVERRIDES)
