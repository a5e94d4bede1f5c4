"""Datasets that are tables: a text column, and perhaps an id column. JSON lines, CSV, Parquet, the hub.

Without an id column the global row number is the id, counted over all files in order. Local tables are
streamed, so that a large one costs no memory; a dataset from the hub is memory-mapped by `datasets`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from sniffer.dataset.files import file_facts, find_files
from sniffer.dataset.source import Source, require_string
from sniffer.errors import DatasetError, first_line


@dataclass(frozen=True, kw_only=True)
class Table(Source):
    """Local table files. `path`: a file, a folder, or a glob."""

    home: ClassVar[str] = "sniffer.tables"

    path: str
    text_column: str = "text"
    id_column: str | None = None

    @property
    def title(self) -> str:
        return self.path

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """The files, in order."""

    @abstractmethod
    def rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """These columns of every row of all files, in order; DatasetError where a file lacks one."""

    def row_ids(self) -> Iterator[Any]:
        # These formats are parsed whole anyway, so a bad text is found here, before any model loads.
        columns = (self.text_column,) if self.id_column is None else (self.text_column, self.id_column)
        for row, (text, *identity) in enumerate(self.rows(*columns)):
            require_string(text, row, self.title)
            yield identity[0] if identity else row

    def row_texts(self, rows: range) -> Iterator[Any]:
        texts = self.rows(self.text_column)
        return (text for (text,) in islice(texts, rows.start, rows.stop, rows.step))

    def facts(self) -> dict[str, Any]:
        return file_facts(self.files)


@dataclass(frozen=True, kw_only=True)
class JsonLines(Table):
    """One JSON object per line, plain or gzipped; blank lines do not count as rows."""

    @cached_property
    def files(self) -> list[Path]:
        return find_files(self.path, (".jsonl", ".ndjson", ".jsonl.gz"))

    def rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        for file in self.files:
            for number, line in enumerate(_lines(file), start=1):
                if line.strip():
                    place = f"{file} line {number}"
                    record = _parsed(line, place)
                    _require_columns(place, columns, [*record, *getattr(record, "twice", ())])
                    yield tuple(record[column] for column in columns)


@dataclass(frozen=True, kw_only=True)
class Csv(Table):
    """CSV with a header line. An id that is written as a plain whole number counts as an integer."""

    @cached_property
    def files(self) -> list[Path]:
        return find_files(self.path, (".csv",))

    def row_ids(self) -> Iterator[Any]:
        return (_as_integer(identity) for identity in super().row_ids())

    def rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        import polars

        for file in self.files:
            try:
                # Of columns of one name, polars would rename all but the first.
                header = polars.read_csv(file, has_header=False, n_rows=1, infer_schema=False, glob=False)
                _require_columns(str(file), columns, [name or "" for name in header.row(0)])
                table = polars.scan_csv(file, infer_schema=False, glob=False)
                for batch in table.select(columns).fill_null("").collect_batches(maintain_order=True):
                    yield from batch.iter_rows()
            except (polars.exceptions.PolarsError, OSError) as error:
                raise DatasetError(f"{file} cannot be read as CSV: {first_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class Parquet(Table):
    """Parquet files; their texts stay unread until they are wanted."""

    @cached_property
    def files(self) -> list[Path]:
        return find_files(self.path, (".parquet",))

    def row_ids(self) -> Iterator[Any]:
        rows = sum(self._row_count(file) for file in self.files)
        if self.id_column is None:
            return iter(range(rows))
        return (identity for (identity,) in self.rows(self.id_column))

    def rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        for file in self.files:
            with _open_parquet(file) as table:
                _require_columns(str(file), columns, table.schema_arrow.names)
                # Documents are long: a few rows at a time are plenty.
                with _readable(file):
                    for batch in table.iter_batches(batch_size=64, columns=list(columns)):
                        batch.validate()
                        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)

    def _row_count(self, file: Path) -> int:
        with _open_parquet(file) as table:
            schema = table.schema_arrow
            _require_columns(str(file), [self.text_column], schema.names)
            _require_text(str(file), self.text_column, str(schema.field(self.text_column).type))
            return int(table.metadata.num_rows)


def _lines(file: Path) -> Iterator[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{file} cannot be read: {first_line(error)}") from error


def _open_parquet(file: Path) -> Any:
    from pyarrow import parquet

    with _readable(file):
        return parquet.ParquetFile(file)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # damaged values are of Python's kinds
        raise DatasetError(f"{file} cannot be read as Parquet: {first_line(error)}") from error


def _require_columns(place: str, wanted: Iterable[str], columns: Sequence[str]) -> None:
    for column in wanted:
        if column not in columns:
            raise DatasetError(
                f"{place} has no column {column!r}, only {', '.join(columns)}: "
                f"set dataset.text_column or dataset.id_column"
            )
        if (count := columns.count(column)) > 1:
            raise DatasetError(f"{place} has {count} columns {column!r}, and which is meant is unknown: rename one")


def _require_text(place: str, column: str, type_name: str) -> None:
    if "string" not in type_name:
        raise DatasetError(f"{place}: the column {column!r} is of type {type_name}, not text: set dataset.text_column")


class Ambiguous(dict[str, Any]):
    """A JSON object that has some of its keys again: those in `twice`, of which a dict keeps the last value."""

    twice: Sequence[str] = ()


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    ambiguous, keys = Ambiguous(record), [key for key, _ in pairs]
    ambiguous.twice = [key for place, key in enumerate(keys) if key in keys[:place]]
    return ambiguous


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parsed(line: str, place: str) -> dict[str, Any]:
    try:
        record = DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DatasetError(f"{place} holds a JSON {type(record).__name__}: wanted one object per line")
    return record


def _as_integer(identity: Any) -> Any:
    if isinstance(identity, str) and re.fullmatch(r"0|[1-9][0-9]*", identity):
        return int(identity)
    return identity
