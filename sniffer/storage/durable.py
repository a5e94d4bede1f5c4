"""Files that are either whole or not there.

A file is written under a temporary name in its own folder, flushed to the disk, renamed, and the rename
flushed too. Whoever sees the final name, after a kill or a power cut as well, sees all of the content.
Temporary names start with a dot and end in `.tmp`, so that leftovers can be told and no glob for data
finds them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sniffer.errors import CaptureError


class HashedFile:
    """An open file that counts and hashes what is written to it, so that nobody has to read it again."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.bytes = 0
        self._file = file
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: what was written has yet to be flushed to the disk, by `durable_file`."""


@contextmanager
def durable_file(path: Path) -> Iterator[HashedFile]:
    """Opens `path` for writing; it appears, complete, when the block ends without an exception.

    An existing file of that name is replaced at that moment.

    Raises:
        CaptureError: the disk is full or cannot be written to. Nothing is left behind; only where the rename could not
            be flushed, the file may be there or not.
    """
    temporary = temporary_for(path)
    try:
        _make_folder(path.parent)
        # It may be another process's, killed, that had the same number; or a link, to have something else replaced.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            hashed = HashedFile(file)
            yield hashed
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CaptureError(could_not_write(error, path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


TEMPORARY = re.compile(r"\.(.+)\.[0-9]+\.tmp", re.DOTALL)


def temporary_for(path: Path) -> Path:
    """The name under which this process writes a file until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def final_name(name: str) -> str | None:
    """The name that a file would have got, if `name` is one that `temporary_for` gives; else None."""
    found = TEMPORARY.fullmatch(name)
    return found[1] if found else None


def _make_folder(folder: Path) -> None:
    """Makes `folder`, and makes the new names in its parents durable too."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and journals renames itself.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def could_not_remove(error: OSError, path: Path) -> str:
    """Why, and what to do, in one line."""
    return f"could not remove {path}: {error.strerror or error}; remove it yourself, or check the folder's permissions"


def could_not_write(error: OSError, path: Path) -> str:
    """Why, and what to do, in one line."""
    reason = error.strerror or str(error)
    try:
        existing = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = f"{shutil.disk_usage(existing).free / 1e6:,.0f} MB free there"
    except (OSError, StopIteration):
        free = "free space unknown"
    return f"could not write {path}: {reason} ({free}); free some space or choose another output folder"
