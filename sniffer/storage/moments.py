"""Files of moments: what all positions of some documents sum up to, by layer, kind, head, bucket and section.

A worker writes all of its moments into one file when all of its rows are on disk, in place of the file that it wrote
before. So there are as many files as there were workers and sessions, none with a document of another, and all together
are of the documents that count. A file's footer lists the documents that it is of.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sniffer.process.memory import available_memory
from sniffer.storage.durable import HashedFile, durable_file
from sniffer.storage.parquet import parquet
from sniffer.storage.row_groups import may_have
from sniffer.storage.schema import FOOTER_KEY, FileRecord
from sniffer.types import MomentRows, Moments, MomentsLayout
from sniffer.words import size

NUMBERS = {
    "mean": pa.float64(),
    "second": pa.float64(),
    "minimum": pa.float32(),
    "maximum": pa.float32(),
    "lengths": pa.float64(),
}
"""Lists of numbers, as `sniffer.types.MomentRows` has them."""

SCHEMA = pa.schema(
    [
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("head", pa.int16(), nullable=False),
        pa.field("bucket", pa.int32(), nullable=False),
        pa.field("section", pa.string(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        *(
            pa.field(name, pa.list_(pa.field("element", one, nullable=False)), nullable=False)
            for name, one in NUMBERS.items()
        ),
    ]
)


@dataclass(frozen=True)
class Moved:
    """A file of moments that a worker has written, and the path of the one before it, which it takes the place of."""

    record: FileRecord
    replaces: str | None


def write_moments(
    folder: Path, path: str, groups: Iterable[Sequence[MomentRows]], documents: Sequence[int]
) -> FileRecord:
    """Writes moments durably, a row group for each head of each group, which is all there is of a (layer, kind).

    Args:
        documents: example ids of those that the moments are of.

    Raises:
        CaptureError: the disk is full or cannot be written to. Nothing is left behind.
    """
    ids = base64.b64encode(np.array(documents, dtype="<i8").tobytes()).decode()
    schema = SCHEMA.with_metadata({FOOTER_KEY: json.dumps({"documents": ids}).encode()})
    rows = 0
    with durable_file(folder / path) as file, _writer(file, schema) as writer:
        for group in groups:
            for place in range(len(group[0].heads) if group else 0):
                writer.write_table(_table(group, place, schema), row_group_size=len(group))
                rows += len(group)
    return FileRecord(path, rows, file.bytes, file.sha256)


def _writer(file: HashedFile, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(pa.PythonFile(file, mode="w"), schema, compression="zstd", use_dictionary=False)


def _table(group: Sequence[MomentRows], place: int, schema: pa.Schema) -> pa.Table:
    """All rows of one head, the one at a place in each."""
    columns = [
        pa.array(np.array([one.layer for one in group], np.int32)),
        pa.array([one.kind for one in group]),
        pa.array(np.array([one.heads[place] for one in group], np.int16)),
        pa.array(np.array([one.bucket for one in group], np.int32)),
        pa.array([one.section for one in group]),
        pa.array(np.array([one.n for one in group], np.int64)),
        *(_lists(np.stack([getattr(one, name)[place] for one in group]), schema.field(name).type) for name in NUMBERS),
    ]
    return pa.table(columns, schema=schema)


def _lists(values: np.ndarray, wanted: pa.DataType) -> pa.Array:
    starts = np.arange(len(values) + 1, dtype=np.int32) * np.int32(values.shape[1])
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(np.ascontiguousarray(values).reshape(-1)), type=wanted)


def documents_of(folder: Path, record: FileRecord) -> frozenset[int]:
    """The example ids of the documents that a file is of; raises as `read_moments`."""
    with parquet(folder / record.path) as file:
        _check(file, record)
        return frozenset(np.frombuffer(_documents(file), dtype="<i8").tolist())


def _documents(file: pq.ParquetFile) -> bytes:
    try:
        return base64.b64decode(json.loads(file.schema_arrow.metadata[FOOTER_KEY])["documents"], validate=True)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("does not say of which documents its moments are") from error


def counts(folder: Path, record: FileRecord) -> pa.Table:
    """Columns layer, kind, head, bucket, section, n of all rows of a file; raises as `read_moments`."""
    with parquet(folder / record.path) as file:
        _check(file, record)
        return file.read(columns=SCHEMA.names[:6])


def read_moments(
    folder: Path, record: FileRecord, layout: MomentsLayout, layer: int, kind: str, head: int, dim: int
) -> Iterator[tuple[int, str, Moments]]:
    """Bucket, section and moments of every row of one head; only that head's part of the file is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not one that a run can have written, or has not what its record says.
    """
    with parquet(folder / record.path) as file:
        _check(file, record)
        wanted: dict[str, int | str] = {"layer": layer, "kind": kind, "head": head}
        every = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        groups = [number for number, group in enumerate(every) if may_have(group, *wanted.values())]
        needed = sum(every[number].total_byte_size for number in groups)
        if needed > (there := available_memory()):
            raise ValueError(f"stands for {size(needed)}, for which the {size(there)} of memory are too little")
        for number in groups:
            table = file.read_row_group(number)
            for row in range(table.num_rows):
                if all(table[name][row].as_py() == value for name, value in wanted.items()):
                    yield table["bucket"][row].as_py(), table["section"][row].as_py(), _moments(table, row, layout, dim)


def _check(file: pq.ParquetFile, record: FileRecord) -> None:
    if file.schema_arrow.remove_metadata() != SCHEMA:
        raise ValueError(f"does not have the columns {', '.join(SCHEMA.names)}")
    if file.metadata.num_rows != record.rows:
        raise ValueError(f"has {file.metadata.num_rows:,} rows, the manifest says {record.rows:,}")


def _moments(table: pa.Table, row: int, layout: MomentsLayout, dim: int) -> Moments:
    values = {name: np.asarray(table[name][row].values.to_numpy(), dtype=np.float64) for name in NUMBERS}
    wanted = {"mean": dim, "minimum": dim, "maximum": dim, "second": layout.seconds(dim)}
    n, lengths = table["n"][row].as_py(), values["lengths"]
    known = all(len(values[name]) == count for name, count in wanted.items())
    if n < 1 or not known or not 1 <= len(lengths) <= 1 + dim // 2:
        raise ValueError("has moments of other lengths than the run's vectors")
    return Moments.of_sums(layout, n, values)
