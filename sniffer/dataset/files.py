"""Datasets that are files: which of them a path means, and what is known of them; those of a URL come from remote.py.

Documents that are files, one each and named by their paths below the folder, are here too; tables are in tables.py.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from sniffer.dataset.compressed import LEAVE_OUT, endings, read_text
from sniffer.dataset.remote import Remote
from sniffer.dataset.source import LATER, Source
from sniffer.errors import DatasetError, UnreadableError
from sniffer.types import Content, is_url
from sniffer.types.places import local_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Files. `path`: a file, a folder (every file below it that ends in one of ENDINGS), a glob, or a URL of these but
    a folder.

    `skip_unreadable`: those that cannot be read are left out and counted, instead of refused. Whether one can be is
    then found out first, by reading it to its end.
    """

    ENDINGS: ClassVar[tuple[str, ...]]

    path: str
    skip_unreadable: bool = field(default=False, metadata=LATER)

    @property
    def title(self) -> str:
        return self.path

    @abstractmethod
    def read_through(self, file: Path) -> Any:
        """Reads all that will be wanted of a file; raises UnreadableError where that cannot be."""

    @cached_property
    def files(self) -> list[Path]:
        """Those to be read, in order."""
        return [file for file in self._named if file not in self._unreadable]

    def facts(self) -> dict[str, Any]:
        left_out = {"unreadable": len(self._unreadable)} if self._unreadable else {}
        return {**file_facts(self.files), **left_out}

    def check(self) -> None:
        with self._as_given():
            super().check()

    def texts(self) -> Iterator[tuple[int, str, Content]]:
        with self._as_given():
            yield from super().texts()

    def _as_given(self) -> AbstractContextManager[None]:
        return nullcontext() if self._remote is None else self._remote.named()

    @cached_property
    def _remote(self) -> Remote | None:
        """Where the path is a URL, its files."""
        return Remote(self.path) if is_url(self.path) and local_path(self.path) == self.path else None

    @cached_property
    def _named(self) -> list[Path]:
        return find_files(local_path(self.path), self.ENDINGS) if self._remote is None else self._remote.files

    @cached_property
    def _unreadable(self) -> set[Path]:
        if not self.skip_unreadable:
            return set()
        found = {}
        for file in self._named:
            try:
                self.read_through(file)
            except UnreadableError as error:
                found[file] = str(error).removesuffix(LEAVE_OUT)
        if found:
            first = next(iter(found.values()))
            first = first if self._remote is None else self._remote.as_given(first)
            log.warning("%d of %d files are left out, the first: %s", len(found), len(self._named), first)
        return set(found)


@dataclass(frozen=True, kw_only=True)
class TextFiles(Files):
    """One document per UTF-8 file, such as books/**/*.md; its id is its path, relative to the folder that was named."""

    ENDINGS = endings(".txt")

    def row_ids(self) -> Iterator[str]:
        root = _root(local_path(self.path)) if self._remote is None else self._remote.folder
        return (file.relative_to(root).as_posix() for file in self.files)

    def row_texts(self, rows: range) -> Iterator[str]:
        return (self.read_through(self.files[row]) for row in rows)

    def some_texts(self, rows: Sequence[int]) -> Iterator[str]:
        return (self.read_through(self.files[row]) for row in rows)

    def read_through(self, file: Path) -> str:
        return read_text(file)


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a path means, in a fixed order: itself, those below a folder, or a glob's.

    Raises:
        DatasetError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [file for file in place.rglob("*") if file.is_file() and file.name.endswith(suffixes)]
        wanted = f"no file ending in {' or '.join(suffixes)} below the folder: name others with a glob"
    else:
        found = [Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file()]
        wanted = "no such file or folder" if not glob.has_magic(path) else "no file matches this glob"
    if not found:
        raise DatasetError(f"dataset.path={path}: {wanted}")
    return sorted(found, key=Path.as_posix)


HASHED_BYTES = 4 << 30
"""Data up to this size are hashed, so that a resumed run can tell that they have changed."""


def file_facts(files: Sequence[Path]) -> dict[str, Any]:
    """The number of files, their bytes in all, and one SHA-256 over the contents unless they are very large."""
    facts: dict[str, Any] = {"files": len(files), "bytes": n_bytes(files)}
    if facts["bytes"] <= HASHED_BYTES:
        facts["sha256"] = hashlib.sha256(b"".join(map(_digest, files))).hexdigest()
    return facts


def n_bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _digest(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}") from error


def _root(path: str) -> Path:
    """The folder that ids are relative to: the one named, or the part of a glob before its first wildcard."""
    place = Path(path).expanduser()
    if place.is_dir():
        return place
    fixed = [parent for parent in place.parents if place.is_file() or not glob.has_magic(str(parent))]
    return fixed[0]
