"""Lazy scans over parts: polars reads only the files and row groups that a query needs.

The layer and kind of a part are in its path. As hive partitions they let polars skip whole files, which
makes a query for one layer of a hundred cost as much as if there were one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32

from sniffer.errors import RunError, first_line, unbroken
from sniffer.limits import ROWS_PER_BYTE
from sniffer.process.memory import available_memory
from sniffer.storage.parquet import parquet
from sniffer.storage.schema import Part
from sniffer.storage.schema import row_schema as arrow_schema
from sniffer.storage.sort import MAX_SPAN_BYTES
from sniffer.types import ALL_KINDS, NONE, ROW_DTYPES, SECTION, Column, Rows
from sniffer.words import size

LIMITED = ("head", "bucket", "position")
"""Columns whose statistics say which row groups a query needs; with SECTION, where there are sections."""

ANY_TEXT = ("", "\U0010ffff")

PARTITION = pl.Schema({"layer": pl.Int16(), "kind": pl.Enum(ALL_KINDS)})

IN_FILE = pl.Schema({"head": pl.Int16}) | {
    name: pl.Series(np.empty(0, dtype)).dtype for name, dtype in ROW_DTYPES.items()
}


def row_schema(columns: Sequence[Column] | None, sections: bool = False) -> pl.Schema:
    """The columns of a scan; None where vectors have no fixed length, and are Lists."""
    values = {"vector": pl.List(pl.Float32)} if columns is None else {one.name: _type(one) for one in columns}
    names = pl.Schema({SECTION: pl.String()} if sections else {})
    return pl.Schema({**PARTITION, **IN_FILE, **names, **values})


def _type(column: Column) -> pl.DataType:
    one = pl.Int32() if column.whole else pl.Float32()
    return one if column.width is None else pl.Array(one, column.width)


def scan_parts(folder: Path, parts: Sequence[Part], columns: Sequence[Column], sections: bool = False) -> pl.LazyFrame:
    """The rows of parts whose values have the same columns, with layer and kind; `sections`: whether they have some."""
    schema = row_schema(columns, sections)
    if not parts:
        return pl.LazyFrame(schema=schema)
    if any("=" in name for name in folder.parts):
        return pl.concat([_scan_alone(folder, part) for part in parts])
    paths = [folder / part.path for part in parts]
    in_file = pl.Schema({name: kind for name, kind in schema.items() if name not in PARTITION})
    rows = pl.scan_parquet(paths, glob=False, schema=in_file, hive_partitioning=True, hive_schema=PARTITION)
    return rows.select(schema.names())


def read_rows(
    folder: Path,
    parts: Sequence[Part],
    head: int,
    dim: int,
    buckets: Collection[int] | None = None,
    max_position: int | None = None,
    has_sections: bool = False,
    sections: Collection[str] | None = None,
) -> tuple[Rows, Float32[np.ndarray, "rows dim"]]:
    """The vectors of one head of parts and where they are from, in the order (bucket, example_id, position).

    By pyarrow, which takes half of polars' time for whole vectors.

    Args:
        dim: of the vectors.
        buckets: those to keep; None keeps all.
        max_position: the last position to keep; None keeps all.
        has_sections: whether the run has sections.
        sections: those to keep; None keeps all.

    Raises:
        RunError: a file is missing or damaged.
    """
    wanted, limits = pc.field("head") == head, dict[str, Span](head=(head, head))
    if buckets is not None:
        wanted &= pc.field("bucket").isin(list(buckets))
        limits["bucket"] = (min(buckets, default=0), max(buckets, default=-1))
    if max_position is not None:
        wanted &= pc.field("position") <= max_position
        limits["position"] = (0, max_position)
    if sections is not None:
        wanted &= pc.field(SECTION).isin(list(sections))
        limits[SECTION] = (min(sections, default=ANY_TEXT[1]), max(sections, default=ANY_TEXT[0]))
    try:
        tables = [_read_part(folder / part.path, dim, limits, wanted, has_sections) for part in parts]
        nothing = as_read(arrow_schema([Column("vector", dim)], has_sections)).empty_table().drop_columns("head")
        table = pa.concat_tables([nothing, *tables])
    except (OSError, pa.ArrowException) as error:
        raise RunError(
            f"could not read {folder}: {first_line(error)}; python -m sniffer.runs verify {folder} tells more"
        ) from error
    rows = Rows.from_columns(table)
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
    if len(parts) > 1 or has_sections:
        order = rows.order
        rows, vectors = rows[order], vectors[order]
    return rows, vectors


def require_room(what: str, rows: int, dim: int) -> None:
    """Raises RunError where so many rows, as arrays, do not fit into the memory that there is."""
    needed = ROOM * rows * (4 * dim + ROW_BYTES)
    if needed > WORTH_ASKING and needed > (there := available_memory()):
        raise RunError(
            f"{what} needs about {size(needed)} of memory, {size(there)} is available: read some buckets or positions "
            "at a time, or scan it lazily"
        )


ROOM, ROW_BYTES, WORTH_ASKING = 2, 24, 1 << 28


def check_parts(what: str, folder: Path, parts: Sequence[Part], dim: int) -> None:
    """Looks at the footers of parts that are about to be read whole.

    Raises:
        RunError: a file is missing, damaged, or stands for other rows than a part can have.
    """
    for part in parts:
        path = folder / part.path
        try:
            seen = path.stat()
            contents = _contents(path, seen.st_size, seen.st_mtime_ns)
            require_part(contents, seen.st_size, dim, part.rows)
        except (OSError, pa.ArrowException) as error:
            reason = unbroken(error)
            raise RunError(
                f"{what} of {folder} cannot be read ({part.path}: {reason}): `python -m sniffer.runs verify {folder}` "
                "tells more"
            ) from error


def require_part(contents: Contents, n_bytes: int, dim: int, rows: int | None = None) -> None:
    """Raises pyarrow.ArrowInvalid where a footer is not a part's: a small file may stand for a large table.

    Args:
        n_bytes: of the file.
        dim: of the vectors.
        rows: as the manifest says, if that is to agree.
    """
    found, largest = contents.metadata.num_rows, max(contents.rows, default=0)
    if rows is not None and found != rows:
        raise pa.ArrowInvalid(f"it has {found:,} rows, the manifest says {rows:,}")
    if found > ROWS_PER_BYTE * n_bytes:
        raise pa.ArrowInvalid(f"it has {n_bytes:,} bytes that stand for {found:,} rows")
    if largest > 1 and 4 * dim * largest > MAX_SPAN_BYTES:
        raise pa.ArrowInvalid(f"it has a row group of {largest:,} rows, larger than any of ours")


def as_read(schema: pa.Schema) -> pa.Schema:
    """A part's schema with its sections as a dictionary: each name is in memory once, however many rows have it."""
    place = schema.get_field_index(SECTION)
    words = pa.dictionary(pa.int32(), pa.string())
    return schema if place < 0 else schema.set(place, schema.field(place).with_type(words))


def part_file(path: Path, sections: bool, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A part, opened so that it is read as `as_read` says; KeyError where it lacks the column."""
    words = [SECTION] if sections else None
    # The row groups of a head lie side by side: to fetch them ahead, piece by piece, only costs.
    return parquet(path, metadata=metadata, read_dictionary=words, pre_buffer=False)


def _read_part(path: Path, dim: int, limits: Mapping[str, Span], wanted: pc.Expression, has_sections: bool) -> pa.Table:
    """The wanted rows of one part, from the row groups whose statistics do not rule them out.

    Args:
        limits: by column, the first and last value wanted.
        wanted: the same, exactly. A row group holds one head, so where only that is asked for, nothing is filtered.
    """
    seen = path.stat()
    contents = _contents(path, seen.st_size, seen.st_mtime_ns)
    require_part(contents, seen.st_size, dim)
    chosen, whole = [], limits.keys() == {"head"}
    for number, spans in enumerate(contents.spans):
        if all(_meet(spans[name], limit) for name, limit in limits.items()):
            chosen.append(number)
            whole &= spans["head"] == limits["head"]
    require_room(str(path), sum(contents.rows[number] for number in chosen), dim)
    columns = [*ROW_DTYPES, *([SECTION] if has_sections else []), "vector"]
    with part_file(path, has_sections, contents.metadata) as file:
        table = file.read_row_groups(chosen, columns=columns if whole else ["head", *columns])
    return table if whole else table.filter(wanted).select(columns)


Span = tuple[Any, Any]
"""The smallest and the largest value."""


def _meet(one: Span, other: Span) -> bool:
    return bool(one[0] <= other[1] and other[0] <= one[1])


@dataclass(frozen=True)
class Contents:
    """A part's footer, and for each row group its rows, and the smallest and largest value of what is asked for."""

    metadata: pq.FileMetaData
    spans: tuple[dict[str, Span], ...]
    rows: tuple[int, ...]


def contents_at(path: Path) -> Contents:
    """What a part holds, as it is now."""
    seen = path.stat()
    return _contents(path, seen.st_size, seen.st_mtime_ns)


@lru_cache(maxsize=64)
def _contents(path: Path, n_bytes: int, changed: int) -> Contents:
    """What a part holds; kept, since heads are mostly read one after the other.

    Args:
        n_bytes, changed: of the file. Parts are written once, but another file may come to be in a part's place.
    """
    with parquet(path, pre_buffer=False) as file:
        return contents_of(file)


def contents_of(file: pq.ParquetFile) -> Contents:
    """What an opened part holds; raises pyarrow.ArrowInvalid where it lacks a part's columns."""
    metadata, names = file.metadata, file.schema_arrow.names
    if missing := [name for name in LIMITED if name not in names]:
        raise pa.ArrowInvalid(f"it is not a part: it has the columns {names}, but no {missing[0]}")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    limited = [*LIMITED, *([SECTION] if SECTION in names else [])]
    spans = ({name: _span(group.column(names.index(name)), name) for name in limited} for group in groups)
    return Contents(metadata, tuple(spans), tuple(group.num_rows for group in groups))


def _span(column: pq.ColumnChunkMetaData, name: str) -> Span:
    """The smallest and largest value of a column in a row group, as far as the file says."""
    known = column.statistics is not None and column.statistics.has_min_max
    unknown = ANY_TEXT if name == SECTION else (-np.inf, np.inf)
    return (column.statistics.min, column.statistics.max) if known else unknown


def join(frames: Sequence[pl.LazyFrame]) -> pl.LazyFrame:
    """Scans below one another; vectors become Lists where lengths differ, and rows without sections belong to none."""
    if not frames:
        return pl.LazyFrame(schema=row_schema(None))
    if any(SECTION in frame.collect_schema() for frame in frames):
        frames = [frame if SECTION in frame.collect_schema() else _in_none(frame) for frame in frames]
    schemas = [frame.collect_schema() for frame in frames]
    uneven = [name for name, dtype in schemas[0].items() if any(schema[name] != dtype for schema in schemas)]
    if uneven:
        frames = [frame.with_columns(pl.col(uneven).cast(pl.List(pl.Float32))) for frame in frames]
    return pl.concat(frames)


def _in_none(frame: pl.LazyFrame) -> pl.LazyFrame:
    names = frame.collect_schema().names()
    place = 1 + names.index("example_id")
    return frame.with_columns(pl.lit(NONE).alias(SECTION)).select(*names[:place], SECTION, *names[place:])


def _scan_alone(folder: Path, part: Part) -> pl.LazyFrame:
    """One part of a folder whose own path would be taken for partitions too, such as runs/seed=3/.

    polars does not skip files by such constants, so that a query for one layer opens them all.
    """
    rows = pl.scan_parquet(folder / part.path, glob=False, hive_partitioning=False)
    layer = pl.lit(part.layer, dtype=PARTITION["layer"]).alias("layer")
    return rows.select(layer, pl.lit(part.kind, dtype=PARTITION["kind"]).alias("kind"), pl.all())
