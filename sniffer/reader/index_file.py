"""sweep.parquet read again: which jobs it names, and what each failed of; checked as anyone may have written it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

import pyarrow as pa
import pyarrow.parquet as pq

from sniffer.storage.parquet import parquet

JOBS = 1 << 20
GROWTH = 256
"""Bytes that one byte of the file may stand for."""

COLUMNS = ("path", "error")


def read_index(path: Path) -> dict[str, str | None]:
    """The jobs, by the names of their folders below the sweep's, and what each failed of, if it did.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no plain file, no index (pyarrow.ArrowInvalid where it is no Parquet file), or names a place
            outside the sweep.
    """
    if not path.is_file():
        raise ValueError("it is no plain file")
    with _opened(path) as file:
        _check(file, path.stat().st_size)
        table = file.read(columns=list(COLUMNS))
    names, errors = (_texts(table[column]) for column in COLUMNS)
    for name in names:
        if name is None or not _lies_below(name):
            raise ValueError(f"it names the job {name!r}, which is outside the sweep")
    return {name: error for name, error in zip(names, errors, strict=True) if name is not None}


def _opened(path: Path) -> pq.ParquetFile:
    """The file, its strings to be read as a dictionary: each is in memory once, however many rows have it."""
    try:
        return parquet(path, read_dictionary=list(COLUMNS))
    except KeyError as error:
        raise ValueError(f"it has no column {error.args[0].decode()} of text") from None


def _check(file: pq.ParquetFile, size: int) -> None:
    footer = file.metadata
    claimed = sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))
    if footer.num_rows > JOBS or claimed > GROWTH * size:
        raise ValueError(f"it has {size:,} bytes that stand for {footer.num_rows:,} jobs in {claimed:,} bytes")
    for column in COLUMNS:
        if not pa.types.is_dictionary(file.schema_arrow.field(column).type):
            raise ValueError(f"it has no column {column} of text")


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    found: list[str | None] = []
    for chunk in column.chunks:
        texts = chunk.dictionary.to_pylist()
        found += [None if place is None else texts[place] for place in chunk.indices.to_pylist()]
    return found


def _lies_below(name: str) -> bool:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return bool(name) and not (posix.is_absolute() or windows.anchor or ".." in (*posix.parts, *windows.parts))
