"""Datasets that are tables: JSON, CSV and Parquet files; hub.py has those of the hub, content.py what a row is.

Without an id column the global row number is the id, counted over all files in order. Local tables are
streamed, so that a large one costs no memory; a dataset from the hub is memory-mapped by `datasets`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from sniffer.dataset.columns import column_of, needed, value_at
from sniffer.dataset.compressed import endings, is_packed, opened, unreadable
from sniffer.dataset.content import Tabular
from sniffer.dataset.files import Files
from sniffer.dataset.records import keys_of, records_of_array, records_of_lines
from sniffer.dataset.source import LATER
from sniffer.errors import ConfigError, first_line


@dataclass(frozen=True, kw_only=True)
class Table(Files, Tabular):
    """Local table files."""

    home: ClassVar[str] = "sniffer.tables"

    @abstractmethod
    def rows_of(self, file: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
        """These columns of every row of a file, in order.

        Raises:
            UnreadableError: it is damaged, or of another format.
            DatasetError: it lacks one of the columns.
        """

    def rows(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """These columns of every row of all files, in order; DatasetError where a file lacks one."""
        for file in self.files:
            yield from self.rows_of(file, *columns)

    def values(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        return self.rows(*columns)

    def row_ids(self) -> Iterator[Any]:
        # These formats are parsed whole anyway, so a bad text is found here, before any model loads.
        return self.ids_of(self.rows)

    def row_texts(self, rows: range) -> Iterator[Any]:
        return islice(self.rows(*self.columns), rows.start, rows.stop, rows.step)

    def read_through(self, file: Path) -> None:
        for _ in self.rows_of(file, *self.columns):
            pass


@dataclass(frozen=True, kw_only=True)
class JsonLines(Table):
    """One JSON object per line; blank lines do not count as rows."""

    ENDINGS = endings(".jsonl", ".ndjson")
    records = staticmethod(records_of_lines)

    def rows_of(self, file: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
        for record, place in self.records(file):
            keys = keys_of(record)
            roots = [column_of(path, keys, place) for path in columns]
            yield tuple(value_at(record[root], path, root, place) for path, root in zip(columns, roots, strict=True))


@dataclass(frozen=True, kw_only=True)
class Json(JsonLines):
    """Files that are one JSON array of objects each."""

    ENDINGS = endings(".json")
    records = staticmethod(records_of_array)


@dataclass(frozen=True, kw_only=True)
class Csv(Table):
    """CSV or TSV with a header line. An id that is written as a plain whole number counts as an integer.

    `separator`: between cells; null for a tab in files named .tsv, and for a comma in others.
    """

    ENDINGS = endings(".csv", ".tsv")

    separator: str | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separator is not None and (len(self.separator.encode()) != 1 or self.separator in '"\r\n'):
            raise ConfigError(f"dataset.separator={self.separator!r} must be one ASCII character, such as ';' or '\\t'")

    def row_ids(self) -> Iterator[Any]:
        return (_as_integer(identity) for identity in super().row_ids())

    def values(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """Numbers as numbers, an empty cell as null."""
        for file in self.files:
            yield from self._cells(file, columns, infer=True)

    def rows_of(self, file: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
        return self._cells(file, columns, infer=False)

    def _cells(self, file: Path, columns: Sequence[str], infer: bool) -> Iterator[tuple[Any, ...]]:
        import polars

        try:
            source, separator = _csv_source(file), self.separator or _separator_of(file)
            how: dict[str, Any] = {"separator": separator, "glob": False}
            # Of columns of one name, polars would rename all but the first.
            header = polars.read_csv(source, has_header=False, n_rows=1, infer_schema=False, **how)
            roots = [column_of(path, [name or "" for name in header.row(0)], str(file)) for path in columns]
            table = polars.scan_csv(source, infer_schema=infer, infer_schema_length=None, **how)
            table = table.select(list(dict.fromkeys(roots)))
            for batch in (table if infer else table.fill_null("")).collect_batches(maintain_order=True):
                for row in zip(*(batch[root] for root in roots), strict=True):
                    yield tuple(map(value_at, row, columns, roots, [str(file)] * len(row)))
        except (polars.exceptions.PolarsError, OSError) as error:
            raise unreadable(f"{file} cannot be read as CSV: {first_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class Parquet(Table):
    """Parquet files; their texts stay unread until they are wanted."""

    ENDINGS = (".parquet",)

    def row_ids(self) -> Iterator[Any]:
        rows = sum(self._row_count(file) for file in self.files)
        if self.id_column is None:
            return iter(range(rows))
        return (identity for (identity,) in self.rows(self.id_column))

    def rows_of(self, file: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
        with _open_parquet(file) as table:
            schema, place = table.schema_arrow, str(file)
            roots = [column_of(path, schema.names, place) for path in columns]
            parts = [needed(schema, path, root) for path, root in zip(columns, roots, strict=True)]
            # Documents are long: a few rows at a time are plenty.
            with _readable(file):
                for batch in table.iter_batches(batch_size=64, columns=parts):
                    batch.validate()
                    for row in zip(*(batch.column(root).to_pylist() for root in roots), strict=True):
                        yield tuple(map(value_at, row, columns, roots, [place] * len(row)))

    def _row_count(self, file: Path) -> int:
        with _open_parquet(file) as table:
            self.require_types(table.schema_arrow, str(file))
            return int(table.metadata.num_rows)


def _csv_source(file: Path) -> Any:
    """What polars is to read; of packed files it would take some for empty, and a cut one for whole."""
    if not is_packed(file):
        return file
    with opened(file) as stream:
        return stream.read()


def _separator_of(file: Path) -> str:
    return "\t" if ".tsv" in file.suffixes[-2:] else ","


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
        raise unreadable(f"{file} cannot be read as Parquet: {first_line(error)}") from error


def _as_integer(identity: Any) -> Any:
    if isinstance(identity, str) and re.fullmatch(r"0|[1-9][0-9]*", identity):
        return int(identity)
    return identity
