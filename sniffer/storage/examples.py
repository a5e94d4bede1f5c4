"""examples.parquet read again: which text each example_id stands for, checked before its numbers are counted by.

A Parquet file can stand for far more than it weighs: one long string for a million rows, a document of two thousand
million tokens, of which every draw would be made again.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sniffer.limits import TOKENS
from sniffer.storage.example_generated import generated_of, without_generated
from sniffer.storage.example_sections import LABEL, require_honest, sections_of
from sniffer.storage.parquet import parquet
from sniffer.storage.schema import END, EXAMPLES_SCHEMA, FIRST, GENERATED, SECTIONS, WINDOWS_SCHEMA, Example, FileRecord

GROWTH = 256
"""Bytes that one byte of the file may stand for; in ours it is some ten, for ids that hardly differ thirty."""

TEXTS = ("source_id", "source", LABEL, END.name)
TOGETHER = (("source_id", LABEL, END.name), TEXTS[:3], ("source_id", LABEL), TEXTS[:2], TEXTS[:1])
"""Columns of texts, as files have them together."""


def as_read(schema: pa.Schema) -> pa.Schema:
    """A schema with its texts as a dictionary: each is in memory once, however many rows have it."""
    words = pa.dictionary(pa.int32(), pa.string())
    return pa.schema([_with_words(field, words) for field in schema])


def _with_words(field: pa.Field, words: pa.DataType) -> pa.Field:
    if field.name != SECTIONS.name:
        return field.with_type(words) if field.name in TEXTS else field
    element = field.type.value_field
    inner = [part.with_type(words) if pa.types.is_string(part.type) else part for part in element.type]
    return field.with_type(pa.list_(element.with_type(pa.struct(inner))))


PLAIN = (EXAMPLES_SCHEMA, WINDOWS_SCHEMA, EXAMPLES_SCHEMA.append(FIRST))
WITH_GENERATED = EXAMPLES_SCHEMA.append(SECTIONS).append(GENERATED).append(END)
KNOWN = (*PLAIN, *(schema.append(SECTIONS) for schema in PLAIN), WITH_GENERATED)
AS_READ = {as_read(schema): schema for schema in KNOWN}
"""What the file may have, and what it then means."""


def read_examples(path: Path, record: FileRecord | None = None) -> dict[int, Example]:
    """The documents by example_id.

    Raises:
        ValueError, OSError: as `examples_table`.
    """
    table = examples_table(path, record)
    more = zip(without_generated(table).to_pylist(), sections_of(table), generated_of(table), strict=True)
    found = (Example(**row, sections=known, generated=written) for row, known, written in more)
    return {example.example_id: example for example in found}


def examples_table(path: Path, record: FileRecord | None = None) -> pa.Table:
    """The documents as they were written.

    Args:
        path: the file, or its twin.
        record: what the manifest says of it, if it is to agree.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no Parquet file (then a pyarrow.ArrowInvalid), or not one that a run can have written.
    """
    with _opened(path) as file:
        _check_footer(file.metadata, path.stat().st_size, record)
        if (schema := AS_READ.get(file.schema_arrow.remove_metadata())) is None:
            raise ValueError(NOT_OURS)
        require_honest(file.metadata, path.stat().st_size)
        table = file.read().unify_dictionaries()
    for name in ("example_id", "source_id"):
        if len(pc.unique(table[name])) != len(table):
            raise ValueError(f"has the same {name} twice")
    table = table.cast(schema)
    longest = pc.min_max(table["n_tokens"]).as_py()
    if len(table) and not 0 <= longest["min"] <= longest["max"] <= TOKENS:
        raise ValueError(f"has documents of {longest['min']:,} to {longest['max']:,} tokens, not 0 to {TOKENS:,}")
    if FIRST.name in table.schema.names:
        first, n_tokens = table[FIRST.name].to_numpy(), table["n_tokens"].to_numpy()
        if (first < 0).any() or (first > n_tokens).any():
            raise ValueError("has documents of which rows begin before their first token, or behind the last")
    return table


NOT_OURS = f"does not have the columns {', '.join(EXAMPLES_SCHEMA.names)}"


def _opened(path: Path) -> pq.ParquetFile:
    """The file, its texts to be read as dictionaries."""
    for texts in TOGETHER:
        with suppress(KeyError):  # it has no such column
            return parquet(path, read_dictionary=texts)
    raise ValueError(NOT_OURS)


def _check_footer(footer: pq.FileMetaData, size: int, record: FileRecord | None) -> None:
    if record is not None and footer.num_rows != record.rows:
        raise ValueError(f"has {footer.num_rows:,} rows, the manifest says {record.rows:,}")
    claimed = sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))
    if footer.num_rows > size or claimed > GROWTH * size:
        raise ValueError(f"has {size:,} bytes that stand for {footer.num_rows:,} rows of {claimed:,} bytes")
