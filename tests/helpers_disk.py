"""A disk that fails: every system call below a folder is counted, and one of them fails, once or from then on.

Calls are those of Python's os and io, which all of our writing goes through; a file that pyarrow opens to read counts
as one. Nothing is flushed to the real disk, which only takes time.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq

WRITING = ("mkdir", "open to write", "write", "fsync", "replace", "unlink")
READING = ("stat", "scandir", "open to read", "read", "flock")


@dataclass
class Disk:
    """Fails call number `at`, counted from 1, and with `lasting` all after it; None never fails.

    `only` are the calls that count, and `names` the files, if not all. `calls` are those seen: what they do, and to
    what.
    """

    folder: Path
    at: int | None = None
    lasting: bool = False
    error: int = errno.EIO
    only: tuple[str, ...] = WRITING
    names: tuple[str, ...] = ()
    calls: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    @cached_property
    def _root(self) -> str:
        return os.path.abspath(self.folder)

    def step(self, what: str, path: Any) -> None:
        """Takes note of a call, and raises what it is to fail with."""
        place = self._place(path)
        if what not in self.only or place is None or (self.names and os.path.basename(place) not in self.names):
            return
        with self._lock:
            self.calls.append(f"{what} {place}")
            number = len(self.calls)
            if self.at is None or number < self.at or (number > self.at and not self.lasting):
                return
            self.failed.append(self.calls[-1])
        raise OSError(self.error, os.strerror(self.error), str(path))

    def _place(self, path: Any) -> str | None:
        """Where it is in the folder; None outside."""
        try:
            full = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.abspath(os.fspath(path))
        except OSError:
            return None
        inside = full == self._root or full.startswith(self._root + os.sep)
        return os.path.relpath(full, self._root) if inside else None


@contextmanager
def failing(disk: Disk) -> Iterator[Disk]:
    """Lets the disk fail while open."""
    with ExitStack() as undo:
        for owner, name, what in (
            (os, "mkdir", "mkdir"),
            (os, "replace", "replace"),
            (os, "rename", "replace"),
            (os, "unlink", "unlink"),
            (os, "stat", "stat"),
            (os, "lstat", "stat"),
            (os, "scandir", "scandir"),
            (fcntl, "flock", "flock"),
        ):
            undo.enter_context(patch.object(owner, name, _counted(disk, what, getattr(owner, name))))
        undo.enter_context(patch.object(os, "fsync", _counted(disk, "fsync", lambda handle: None)))
        undo.enter_context(patch.object(os, "open", _opened(disk, os.open)))
        undo.enter_context(patch.object(io, "open", _file_opener(disk, io.open)))
        undo.enter_context(patch("builtins.open", io.open))
        undo.enter_context(patch.object(pq.ParquetFile, "__init__", _read(disk, pq.ParquetFile.__init__)))
        yield disk


def _counted(disk: Disk, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(path: Any = ".", *more: Any, **options: Any) -> Any:
        disk.step(what, path)
        return call(path, *more, **options)

    return counted


def _opened(disk: Disk, call: Callable[..., int]) -> Callable[..., int]:
    def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
        disk.step("open to write" if flags & (os.O_WRONLY | os.O_RDWR) else "open to read", path)
        return call(path, flags, *more, **options)

    return opened


def _read(disk: Disk, call: Callable[..., None]) -> Callable[..., None]:
    def read(self: pq.ParquetFile, source: Any, *more: Any, **options: Any) -> None:
        if isinstance(source, str | Path):
            disk.step("open to read", source)
        call(self, source, *more, **options)

    return read


def _file_opener(disk: Disk, honest: Callable[..., Any]) -> Callable[..., Any]:
    def opened(path: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        if isinstance(path, int) or disk._place(path) is None:
            return honest(path, mode, buffering, *text, **options)
        writes = not set(mode).isdisjoint("wax+")
        disk.step("open to write" if writes else "open to read", path)
        raw = _Raw(disk, path, mode.replace("b", "").replace("t", ""), options.pop("opener", None))
        file = io.BufferedWriter(raw) if writes else io.BufferedReader(raw)
        return file if "b" in mode else io.TextIOWrapper(file, *text, **options)

    return opened


class _Raw(io.FileIO):
    """A file whose reads and writes count. A write that fails has written half: a full disk takes what fits."""

    def __init__(self, disk: Disk, path: Any, mode: str, opener: Callable[[str, int], int] | None = None) -> None:
        super().__init__(path, mode, opener=opener)
        self._disk = disk

    def write(self, data: Any) -> int:
        try:
            self._disk.step("write", self.name)
        except OSError:
            super().write(bytes(data)[: len(data) // 2])
            raise
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self._disk.step("read", self.name)
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._disk.step("read", self.name)
        return super().readall()
