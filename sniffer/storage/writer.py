"""Rows to Parquet: one part per (layer, kind), sorted so that a reader skips what it does not want.

Every head has row groups of its own, written one span at a time (see sort.py), so that beside the
captured rows only one span of one head is in memory. Widening to float32 is exact for bfloat16 and
float16. Parts share nothing: several threads may each write one.

Floats hardly repeat, but their sign and exponent bytes do: BYTE_STREAM_SPLIT puts equal bytes of neighbouring
floats side by side, and zstd then takes a narrower dtype of the model back out: a bfloat16 takes 1.5 bytes, not 4.
Of float32 that would save a sixth, for half as much processor time again to write, and a quarter to read (the
suites storage and reading of benchmarks/), so those are left plain unless `output.compression` says otherwise.
Metadata columns are small once a dictionary or deltas have taken out what repeats; zstd on those too would cost a
tenth of the time and save a hundredth of the size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from sniffer.forward.columns import Columns
from sniffer.storage.digest import Digest, digest_rows, sum_rows
from sniffer.storage.durable import durable_file
from sniffer.storage.example_generated import with_generated
from sniffer.storage.example_sections import with_sections
from sniffer.storage.finite import NotFinite, count_not_finite
from sniffer.storage.layout import RunFolder
from sniffer.storage.schema import (
    EXAMPLES_SCHEMA,
    FIRST,
    METADATA_COLUMNS,
    MOST_SECTIONS,
    WINDOWS_SCHEMA,
    Example,
    FileRecord,
    Footer,
    Part,
    leaf,
    row_schema,
    to_arrow,
)
from sniffer.storage.sort import spans
from sniffer.types import SECTION, Column, Names, Rows, codec

DELTA_COLUMNS = ("position",)
"""Ascending within an example and bucket, so that differences are small."""

UNCOMPRESSED_PAGE_BYTES = 128 * 1024
"""A page that is not compressed stays in the processor's cache while it is put together. zstd wants large ones."""

WRITE_BYTES = 1024 * 1024
"""Handed to the file at a time: pyarrow itself writes page by page, and each of those calls goes through Python."""


def parquet_options(values: Sequence[Column], vector_codec: str, sections: bool = False) -> dict[str, Any]:
    """How pyarrow is to write a part; `vector_codec` as `sniffer.types.codec` gives it; whether it has `sections`."""
    leaves, metadata = [leaf(column) for column in values], [*METADATA_COLUMNS, *([SECTION] if sections else [])]
    if vector_codec == "zstd":
        encoding, of_pages = "BYTE_STREAM_SPLIT", dict[str, Any](compression_level=dict.fromkeys(leaves, 1))
    else:
        encoding, of_pages = "PLAIN", dict[str, Any](data_page_size=UNCOMPRESSED_PAGE_BYTES)
    return {
        "compression": {**dict.fromkeys(metadata, "none"), **dict.fromkeys(leaves, vector_codec)},
        "use_dictionary": [column for column in metadata if column not in DELTA_COLUMNS],
        "column_encoding": {**dict.fromkeys(leaves, encoding), **dict.fromkeys(DELTA_COLUMNS, "DELTA_BINARY_PACKED")},
        "write_statistics": metadata,
        **of_pages,
    }


def write_part(
    folder: Path,
    path: str,
    columns: Columns,
    footer: Footer,
    compression: str = "auto",
    values: Sequence[Column] | None = None,
    sections: bool = False,
) -> Part:
    """Writes one part, durably: it appears under its name only when complete.

    Args:
        folder: the run folder.
        path: where in it, as `schema.part_path` gives it.
        columns: the rows, which are left as they are; no rows make a valid part without row groups.
        footer: what the file says of itself.
        compression: of the vectors, one of sniffer.types.COMPRESSIONS.
        values: the columns that a row's numbers become; None for a vector.
        sections: whether the run has sections; where the rows have none, they belong to none.

    Returns:
        What the manifest remembers of the part.

    Raises:
        CaptureError: the disk is full or cannot be written to. Nothing is left behind.
    """
    if sections and columns.rows.section is None:
        columns = replace(columns, rows=replace(columns.rows, section=Names.none(len(columns))))
    order = columns.rows.part_order
    ordered, pieces = columns.rows[order], spans(columns, order)
    values = (Column("vector", columns.dim),) if values is None else values
    schema = row_schema(values, sections).with_metadata(footer.encode())
    options = parquet_options(values, codec(compression, footer.source_dtype), sections)
    sums = sum_rows(ordered)
    digest, not_finite = Digest(), NotFinite()
    with (
        durable_file(folder / path) as file,
        pa.BufferedOutputStream(pa.PythonFile(file, mode="w"), WRITE_BYTES) as sink,
        pq.ParquetWriter(sink, schema, **options) as writer,
    ):
        for place, head in enumerate(columns.heads):
            for span in pieces:
                vectors, here = span.vectors(columns, place), ordered[span.rows]
                digest += digest_rows(footer.layer, footer.kind, head, sums[span.rows], vectors)
                not_finite += count_not_finite(vectors)
                for group in span.row_groups:
                    table = _table(schema, values, head, here[group], vectors[group])
                    writer.write_table(table, row_group_size=table.num_rows)
    return Part(
        path=path,
        rows=len(columns) * len(columns.heads),
        bytes=file.bytes,
        sha256=file.sha256,
        layer=footer.layer,
        kind=footer.kind,
        digest=str(digest),
        buckets=_rows_per_bucket(columns),
        rows_with_nan=not_finite.nan,
        rows_with_infinity=not_finite.infinity,
        sections=rows_per_section(columns.rows, len(columns.heads)),
    )


def write_vectors(
    folder: Path,
    path: str,
    heads: tuple[int, ...],
    vectors: Sequence[Float32[np.ndarray, "rows dim"]],
    rows: Rows,
    footer: Footer,
) -> Part:
    """As `write_part`, of vectors that are at hand as arrays, one for each head."""
    import torch

    side_by_side = torch.from_numpy(np.concatenate(vectors, axis=1))
    columns = Columns(heads, [side_by_side], rows, footer.dim)
    return write_part(folder, path, columns, footer, sections=rows.section is not None)


@dataclass(frozen=True)
class Listing:
    """examples.parquet before it is on disk: its content, and what the manifest is to say of it."""

    content: bytes
    record: FileRecord

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Listing:
        """Which text each example_id stands for, ordered by example_id."""
        ordered = sorted(examples, key=lambda example: example.example_id)
        schema = WINDOWS_SCHEMA if any(example.source is not None for example in ordered) else EXAMPLES_SCHEMA
        if any(example.first_position for example in ordered):
            schema = schema.append(FIRST)
        columns = {name: [getattr(example, name) for example in ordered] for name in schema.names}
        table, options = pa.Table.from_pydict(columns, schema=schema), dict[str, Any](compression="zstd")
        if any(example.sections is not None for example in ordered):
            table, options = with_sections(table, [example.sections for example in ordered])
        if any(example.generated is not None for example in ordered):
            table = with_generated(table, ordered, options)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **options)
        content = sink.getvalue().to_pybytes()
        return cls(content, FileRecord(RunFolder.EXAMPLES, len(ordered), len(content), sha256(content).hexdigest()))

    def write(self, folder: Path, path: str = RunFolder.EXAMPLES) -> None:
        """Writes the file, durably, under its own name or its twin's.

        Raises:
            CaptureError: the disk is full or cannot be written to. Nothing is left behind.
        """
        with durable_file(folder / path) as file:
            file.write(self.content)


def _table(
    schema: pa.Schema, values: Sequence[Column], head: int, rows: Rows, vectors: Float32[np.ndarray, "rows dim"]
) -> pa.Table:
    """One row group."""
    columns = {
        "head": pa.array(np.full(len(vectors), head, dtype=np.int16)),
        **{name: pa.array(column) for name, column in rows.columns().items()},
    }
    first = 0
    for column in values:
        columns[column.name] = to_arrow(column, vectors[:, first : first + column.values])
        first += column.values
    if rows.section is not None:
        known = list(rows.section.known)
        columns[SECTION] = pa.DictionaryArray.from_arrays(rows.section.codes, known).cast(pa.string())
    return pa.table([columns[name] for name in schema.names], schema=schema)


def rows_per_section(rows: Rows, heads: int) -> dict[str, int] | None:
    """Of a part, all heads together; None without sections, and where there are too many to list."""
    if rows.section is None or len(found := rows.section.counts()) > MOST_SECTIONS:
        return None
    return {name: count * heads for name, count in found.items()}


def _rows_per_bucket(columns: Columns) -> dict[int, int]:
    buckets, positions = np.unique(columns.rows.bucket, return_counts=True)
    return {int(b): int(n) * len(columns.heads) for b, n in zip(buckets, positions, strict=True)}
