"""Folders that are made for a purpose, and taken away again when nothing has come of it.

What is refused leaves no stub behind that would stand in the way of the next try. Only what was made is taken away:
files that were there before, and folders that hold anything else, stay.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sniffer.errors import RunError
from sniffer.storage.layout import RunFolder


def first_existing(folder: Path) -> Path:
    """The folder itself, or the lowest of those above it that is there."""
    return next((one for one in (folder, *folder.parents) if one.exists()), folder)


def remove_empty(folder: Path, root: Path) -> None:
    """Removes a folder and those above it, as long as they are empty and lie below `root`."""
    with suppress(OSError):
        while root in folder.parents:
            folder.rmdir()
            folder = folder.parent


def forget(folder: Path, root: Path) -> None:
    """Takes away what a run that never began has left in a folder that held nothing before it."""
    for handler in logging.root.handlers[:]:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == folder:
            logging.root.removeHandler(handler)
            handler.close()
    for name in RunFolder.BEFORE:
        path = folder / name
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    remove_empty(folder, root)


@contextmanager
def made(folder: Path, worth_keeping: Callable[[Path], bool] = lambda folder: False) -> Iterator[None]:
    """Makes a folder, which may be there but must be empty; after an exception it is as it was before.

    Args:
        worth_keeping: whether what it holds then should stay all the same.

    Raises:
        FileExistsError: it holds something.
    """
    root = first_existing(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(17, "exists already", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not worth_keeping(folder):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            remove_empty(folder, root)
        raise


def holds_rows(folder: Path) -> bool:
    """Whether a run has written rows here that a resume could start from."""
    from sniffer.storage.manifest import Manifest

    with suppress(RunError):
        manifest, _ = Manifest.recover(folder)
        return any(part.rows for part in (*manifest.parts, *manifest.pending))
    return False
