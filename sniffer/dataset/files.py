"""Documents that are files: one each, named by their paths below the folder."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sniffer.dataset.source import Source
from sniffer.errors import DatasetError


@dataclass(frozen=True, kw_only=True)
class TextFiles(Source):
    """One document per UTF-8 file; its id is its path, relative to the folder that was named.

    `path`: a file, a folder (every .txt below it), or a glob such as books/**/*.md.
    """

    path: str

    @property
    def title(self) -> str:
        return self.path

    def row_ids(self) -> Iterator[str]:
        root = _root(self.path)
        return (file.relative_to(root).as_posix() for file in self._files)

    def row_texts(self, rows: range) -> Iterator[str]:
        return (_read(self._files[row]) for row in rows)

    def facts(self) -> dict[str, Any]:
        return file_facts(self._files)

    @cached_property
    def _files(self) -> list[Path]:
        return find_files(self.path, (".txt",))


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
    n_bytes = sum(file.stat().st_size for file in files)
    facts: dict[str, Any] = {"files": len(files), "bytes": n_bytes}
    if n_bytes <= HASHED_BYTES:
        facts["sha256"] = hashlib.sha256(b"".join(map(_digest, files))).hexdigest()
    return facts


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


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}") from error
