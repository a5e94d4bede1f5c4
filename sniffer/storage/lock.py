"""One process per run folder: a lock that ends with the process that holds it.

The lock is the operating system's own, on the file `.lock` in the folder, so that it is let go of by a kill
or a crash as well. A manifest that says `running` in a folder that nobody holds is thus that of a killed run.
On a file system without locks, and on Windows, nothing is held.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sniffer.errors import RunError
from sniffer.storage.layout import RunFolder
from sniffer.storage.remote import RemotePath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_FILE = "{} is a link, or no plain file: remove it"
CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Makes no file elsewhere through a link, and does not wait for someone to write into a FIFO."""

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


@contextmanager
def hold(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps every other process from writing into `folder`; `wait` for one that does, instead of refusing.

    Raises:
        RunError: another process does so right now, or the folder cannot be written to.
    """
    try:
        handle = os.open(folder / RunFolder.LOCK, os.O_RDWR | os.O_CREAT | CAREFULLY, 0o644)
    except OSError as error:
        raise _refusal(folder, error) from error
    try:
        if not _is_file(handle):
            raise RunError(NO_FILE.format(folder / RunFolder.LOCK))
        try:
            free = _try(handle, exclusive=True, wait=wait)
        except OSError as error:
            raise _refusal(folder, error) from error
        if not free:
            raise RunError(f"{folder} is being written to by another process: wait for it, or stop it first")
        yield
    finally:
        os.close(handle)


def _refusal(folder: Path, error: OSError) -> RunError:
    if (folder / RunFolder.LOCK).is_symlink():
        return RunError(NO_FILE.format(folder / RunFolder.LOCK))
    return RunError(f"cannot write into {folder}: {error.strerror}; check its permissions")


def is_held(folder: Path) -> bool:
    """Whether a process is writing into `folder` right now; of one at a URL nobody can tell."""
    if isinstance(folder, RemotePath):
        return False
    try:
        handle = os.open(folder / RunFolder.LOCK, os.O_RDONLY | CAREFULLY)
    except OSError:
        return False
    try:
        return _is_file(handle) and not _try(handle, exclusive=False)
    finally:
        os.close(handle)


def _is_file(handle: int) -> bool:
    return stat.S_ISREG(os.fstat(handle).st_mode)


def _try(handle: int, *, exclusive: bool, wait: bool = False) -> bool:
    """Takes the lock, or says that another process has it; True as well where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
