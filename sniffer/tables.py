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
from typing import Any

from sniffer.dataset import Source, file_facts, find_files, require_string
from sniffer.errors import DatasetError, first_line


@dataclass(frozen=True, kw_only=True)
class Table(Source):
    """Local table files. `path`: a file, a folder, or a glob."""

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


@dataclass(frozen=True, kw_only=True)
class Hub(Source):
    """A dataset on the Hugging Face hub, or any other that `datasets.load_dataset` takes by name.

    With HF_HUB_OFFLINE=1 the copy in the local cache is used.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    id_column: str | None = None

    @property
    def title(self) -> str:
        return f"{self.name} ({self.split})"

    def row_ids(self) -> Iterator[Any]:
        columns = self._table.column_names
        _require_columns(self.title, [self.text_column], columns)
        feature = self._table.features[self.text_column]
        _require_text(self.title, self.text_column, getattr(feature, "dtype", type(feature).__name__))
        if self.id_column is None:
            return iter(range(len(self._table)))
        _require_columns(self.title, [self.id_column], columns)
        return iter(self._table[self.id_column])

    def row_texts(self, rows: range) -> Iterator[Any]:
        chosen = self._table.select_columns([self.text_column]).select(rows)
        return (row[self.text_column] for row in chosen)

    def facts(self) -> dict[str, Any]:
        """The commit; of a local folder, and of a cached copy that names none, what its files hold."""
        commit = self._commit or self._cached_commit
        return {"commit": commit, **({} if commit else file_facts(self._files))}

    @property
    def _cached_commit(self) -> str | None:
        """The commit that `datasets` has in the path of its own copy; a local folder has none."""
        homes = {Path(file["filename"]).parent.name for file in self._table.cache_files}
        commits = [home for home in homes if re.fullmatch(r"[0-9a-f]{40}", home)]
        return commits[0] if len(commits) == 1 == len(homes) else None

    @property
    def _files(self) -> list[Path]:
        """A local folder's data files and what it says of them; else those of the cached copy."""
        folder = Path(self.name).expanduser()
        if not folder.is_dir():
            return sorted(Path(file["filename"]) for file in self._table.cache_files)
        import datasets

        named = datasets.load_dataset_builder(self.name, self.config).config.data_files or {}
        files = {Path(file) for listed in named.values() for file in listed}
        about = {folder / name for name in ("README.md", "dataset_infos.json")}
        return sorted(file for file in files | about if file.is_file())

    @cached_property
    def _table(self) -> Any:
        commit = self._commit
        import datasets

        try:
            return datasets.load_dataset(self.name, self.config, split=self.split, revision=commit or self.revision)
        except Exception as error:
            reason = first_line(_innermost(error))
            raise DatasetError(f"{self.title} cannot be loaded: {reason}") from error

    @cached_property
    def _commit(self) -> str | None:
        """The commit to load; None for a local folder, or when the cache is to be used."""
        return None if Path(self.name).expanduser().exists() else hub_commit(self.name, self.revision)


def hub_commit(name: str, revision: str | None) -> str | None:
    """Asks the hub whether a dataset may be read, and for its commit; None if told to stay offline.

    Raises:
        DatasetError: gated, not found, or no network; at once, where loading would try for half a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = HfApi()
    try:
        hub.auth_check(name, repo_type="dataset")
        return hub.dataset_info(name, revision=revision, timeout=10).sha
    except OfflineModeIsEnabled:
        return None
    except GatedRepoError as error:
        problem = f"is gated: accept its terms on https://huggingface.co/datasets/{name}, then run `hf auth login`"
        raise DatasetError(f"the dataset {name} {problem}") from error
    except RevisionNotFoundError as error:
        raise DatasetError(f"the dataset {name} has no revision {revision}: check dataset.revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        problem = "is not on the hub, or private: check dataset.name, or run `hf auth login`"
        raise DatasetError(f"the dataset {name} {problem}") from error
    except Exception as error:  # whichever HTTP library the hub's client is built on
        problem = f"no network to the hub ({first_line(error)})"
        raise DatasetError(
            f"{problem}: connect, set HF_HUB_OFFLINE=1 to use a cached copy of {name}, or choose local text"
        ) from error


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


def _innermost(error: BaseException) -> BaseException:
    """`datasets` wraps what went wrong; the first cause is what a person can act on."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error
