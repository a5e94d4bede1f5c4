"""Which files a checkpoint consisted of: a SHA-256 of each, whole, for the manifest.

A large file is read once. Afterwards it is known by its path, size, inode and times, and its SHA-256 is looked up in
the cache folder: reading 140 GB takes a minute, at each start. `begin` has large files read by threads of their own
while the weights are loaded from them, so that the first start takes hardly longer either. A file that has changed a
moment ago could change again within one tick of the clock of its times; it is not remembered.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import BoundedSemaphore, Event, Thread
from uuid import uuid4

from sniffer.errors import CheckpointError

from .embedded import cache_folder

log = logging.getLogger(__name__)

LARGE = 64 << 20
"""Bytes from which on a file is read once and remembered; smaller ones are read each time."""
SETTLED_NS = 2_000_000_000
"""How long ago a file must have changed for its times to tell whether it has changed again."""
TOLD = 4 << 30
"""Bytes to read that are worth a line in the log."""
EARLIER_BYTES = 1 << 30
"""Early manifests have larger files by size and first MiB only; see `_value`."""


@dataclass
class _Reading:
    """A file being read by a thread."""

    digest: str = ""
    error: OSError | None = None
    done: Event = field(default_factory=Event)


_readings: dict[str, _Reading] = {}
"""By the file's identity."""
_slots = BoundedSemaphore(min(8, os.cpu_count() or 1))


def begin(folder: Path, only: str | None = None) -> None:
    """Begins to read the large files of a checkpoint that are not known yet; `digests` will wait for them."""
    unknown = [path for path in files_of(folder, only) if path.stat().st_size >= LARGE and not _known(path)]
    size = sum(path.stat().st_size for path in unknown)
    if size >= TOLD:
        log.info("reading the %d files (%.1f GB) of %s once, to know them by SHA-256", len(unknown), size / 1e9, folder)
    for path in unknown:
        _start(path)


def digests(folder: Path, only: str | None = None) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, or of the `only` one it consists of and what an adapter adds.

    Raises:
        CheckpointError: a file cannot be read.
    """
    begin(folder, only)
    return {path.name: _value(path) for path in files_of(folder, only)}


def identities(folder: Path, only: str | None = None) -> dict[str, str]:
    """What tells whether a file of a checkpoint has been touched, by its name; nothing is read."""
    return {path.name: _identity(path) for path in files_of(folder, only)}


@contextmanager
def unchanged(source: str | None, only: str | None = None) -> Iterator[None]:
    """Has the files of a checkpoint on this machine read for their digests meanwhile, and stay what they are.

    Args:
        source: its folder; None, or a hub id, where there are no files yet.

    Raises:
        CheckpointError: one was changed while they were loaded.
    """
    if source is None or not (folder := Path(source)).is_dir():
        yield
        return
    begin(folder, only)
    before = identities(folder, only)
    yield
    after = identities(folder, only)
    if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
        raise CheckpointError(f"{folder} was changed while it was loaded ({', '.join(changed)}): start again")


def files_of(folder: Path, only: str | None = None) -> list[Path]:
    """The files that a checkpoint consists of."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return [path for path in files if only in (None, path.name) or path.name.startswith("adapter_")]


def snapshot_commit(folder: Path | None) -> str | None:
    """The commit in a hub cache path (.../snapshots/<commit>)."""
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def _value(path: Path) -> str:
    """What the manifest says of a file. That of a very large one begins as early releases had it, so both compare."""
    size, digest = path.stat().st_size, f"sha256:{_digest(path)}"
    if size <= EARLIER_BYTES:
        return digest
    with path.open("rb") as stream:
        head = hashlib.sha256(stream.read(1 << 20)).hexdigest()
    return f"{size} bytes, first MiB sha256:{head}, {digest}"


def _digest(path: Path) -> str:
    try:
        if path.stat().st_size < LARGE:
            return _sha256(path)
        return _known(path) or _wait(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _wait(path: Path) -> str:
    """The digest of the file as it is now: read again, should it have changed while it was read."""
    identity = _identity(path)
    reading = _start(path)
    reading.done.wait()
    _readings.pop(identity, None)
    if reading.error is not None:
        raise reading.error
    return reading.digest if _identity(path) == identity else _wait(path)


def _start(path: Path) -> _Reading:
    identity = _identity(path)
    if identity not in _readings:
        _readings[identity] = reading = _Reading()
        # Not a pool, whose threads a process that is told to end would wait for.
        Thread(target=_read, args=(path, identity, reading), daemon=True).start()
    return _readings[identity]


def _read(path: Path, identity: str, reading: _Reading) -> None:
    with _slots:
        try:
            settled = _settled(path)
            reading.digest = _sha256(path)
            if settled and _identity(path) == identity:
                _remember(identity, reading.digest)
        except OSError as error:
            reading.error = error
        finally:
            reading.done.set()


def _identity(path: Path) -> str:
    """Stands for a file as it is: another content has another size or later times, or is another inode."""
    facts = path.stat()
    told = (str(path.resolve()), facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _settled(path: Path) -> bool:
    facts = path.stat()
    return time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) > SETTLED_NS


def _known(path: Path) -> str | None:
    """The digest that was remembered of a file as it is now."""
    try:
        digest = (_memory() / _identity(path)).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return digest if len(digest) == 64 else None


def _remember(identity: str, digest: str) -> None:
    """A cache that cannot be written to costs time only."""
    with suppress(OSError):
        _memory().mkdir(parents=True, exist_ok=True)
        new = _memory() / f".{uuid4().hex}.tmp"
        new.write_text(digest, encoding="ascii")
        new.replace(_memory() / identity)


def _memory() -> Path:
    return cache_folder() / "digests"
