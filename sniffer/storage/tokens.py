"""The token ids of a run's documents, in files of their own: what the texts were to the model, to the last token.

The process that reads the texts has them from when a document is met until its rows count (`Kept`); with the commit
that counts them they go to disk, each document once. The manifest names the files, as it does parts. A file can stand
for far more than it weighs, so its footer is looked at before anything is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int32, Int64

from sniffer.limits import TOKENS
from sniffer.process.memory import available_memory
from sniffer.storage.durable import HashedFile, durable_file
from sniffer.storage.layout import RunFolder
from sniffer.storage.parquet import parquet
from sniffer.storage.row_groups import may_have
from sniffer.storage.schema import Example, FileRecord
from sniffer.types import Document
from sniffer.words import size

Tokens = Int32[np.ndarray, " n_tokens"]

SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.int64(), nullable=False),
        pa.field("token_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
    ]
)

GROUP = 1 << 20
"""Tokens of a row group, about: one document is then read without the others."""

WORTH_ASKING = 1 << 26
"""Tokens for which the memory that is left is looked at first."""


class Kept:
    """Token ids that are not on disk yet.

    Args:
        keep: whether they are wanted at all.
        on_disk: documents whose token ids are there already.
    """

    def __init__(self, *, keep: bool = True, on_disk: Collection[int] = frozenset()) -> None:
        self._keep = keep
        self._on_disk = set(on_disk)
        self._held: dict[int, Tokens] = {}

    def add(self, documents: Iterable[Document]) -> None:
        if self._keep:
            new = {one.example_id: one.token_ids for one in documents if one.example_id not in self._on_disk}
            self._held |= new

    def waiting(self, committed: Mapping[int, Example]) -> dict[int, Tokens]:
        """Those of documents that count, with what a model has written after them."""
        known = ((committed[number], tokens) for number, tokens in self._held.items() if number in committed)
        return {example.example_id: _whole(tokens, example) for example, tokens in known}

    def write(
        self, folder: Path, committed: Mapping[int, Example], before: Sequence[FileRecord]
    ) -> tuple[FileRecord, ...]:
        """Writes what is waiting into a new file, beside those of `before`; all files that then count.

        Raises:
            CaptureError: the disk is full or cannot be written to. Nothing is let go of.
        """
        waiting = self.waiting(committed)
        if not waiting:
            return tuple(before)
        number = 1 + max((RunFolder.part_number(record.path) for record in before), default=-1)
        record = write_tokens(folder, RunFolder.tokens(number), waiting)
        self._on_disk |= waiting.keys()
        for example in waiting:
            del self._held[example]
        return (*before, record)


def _whole(tokens: Tokens, example: Example) -> Tokens:
    return tokens if example.generated is None else np.concatenate([tokens, example.generated.token_ids])


def write_tokens(folder: Path, path: str, documents: Mapping[int, Tokens]) -> FileRecord:
    """Writes the token ids of some documents, durably, ordered by example_id.

    Raises:
        CaptureError: the disk is full or cannot be written to. Nothing is left behind.
    """
    with durable_file(folder / path) as file, _writer(file) as writer:
        for group in _groups(sorted(documents), documents):
            arrays = [np.asarray(documents[example], dtype=np.int32) for example in group]
            starts = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
            ids = pa.ListArray.from_arrays(starts, np.concatenate(arrays), type=SCHEMA.field("token_ids").type)
            table = pa.table([pa.array(group, pa.int64()), ids], schema=SCHEMA)
            writer.write_table(table, row_group_size=len(group))
    return FileRecord(path, len(documents), file.bytes, file.sha256)


def _writer(file: HashedFile) -> pq.ParquetWriter:
    return pq.ParquetWriter(pa.PythonFile(file, mode="w"), SCHEMA, compression="zstd")


def _groups(examples: Iterable[int], documents: Mapping[int, Tokens]) -> Iterator[list[int]]:
    group: list[int] = []
    n_tokens = 0
    for example in examples:
        group.append(example)
        n_tokens += len(documents[example])
        if n_tokens >= GROUP:
            yield group
            group, n_tokens = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class TokenTable:
    """The token ids of documents, one after the other; `starts` has one entry more than `example_ids`, which ascend."""

    example_ids: Int64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " n_and_one"]
    token_ids: Tokens

    def __len__(self) -> int:
        return len(self.example_ids)

    def of(self, example_id: int) -> Tokens | None:
        """One document's; None for a document that has none here."""
        place = int(np.searchsorted(self.example_ids, example_id))
        if place == len(self) or self.example_ids[place] != example_id:
            return None
        return self.token_ids[self.starts[place] : self.starts[place + 1]]

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens of each document."""
        return dict(zip(self.example_ids.tolist(), np.diff(self.starts).tolist(), strict=True))

    def disagree(
        self, example_ids: Int64[np.ndarray, " rows"], positions: Int32[np.ndarray, " rows"], found: Tokens
    ) -> Bool[np.ndarray, " rows"]:
        """Which rows have another token than their document has there; one of a document that has none here has not."""
        place = np.minimum(np.searchsorted(self.example_ids, example_ids), max(0, len(self) - 1))
        if not len(self):
            return np.zeros(len(found), dtype=bool)
        known = self.example_ids[place] == example_ids
        inside = known & (positions >= 0) & (self.starts[place] + positions < self.starts[place + 1])
        there = np.full(len(found), -1, dtype=np.int64)
        there[inside] = self.token_ids[(self.starts[place] + positions)[inside]]
        return known & (there != found)


def read_tokens(folder: Path, records: Iterable[FileRecord], example_id: int | None = None) -> TokenTable:
    """The token ids of all documents in some files, or of one.

    Raises:
        OSError: one cannot be read.
        ValueError: one is no Parquet file (then a pyarrow.ArrowInvalid), not one that a run can have written, has not
            what its record says, or a document is in two.
    """
    tables = [SCHEMA.empty_table(), *(_read(folder / record.path, record, example_id) for record in records)]
    table = pa.concat_tables(tables).sort_by("example_id").combine_chunks()
    ids = table["example_id"].to_numpy()
    if (np.diff(ids) == 0).any():
        raise ValueError("has a document twice")
    lists = table["token_ids"].combine_chunks()
    lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
    starts = np.concatenate(([0], np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)))
    return TokenTable(ids, starts, lists.flatten().to_numpy())


def _read(path: Path, record: FileRecord, example_id: int | None) -> pa.Table:
    with parquet(path) as file:
        groups = _groups_with(file, record, example_id)
        table = file.read_row_groups(groups) if groups else SCHEMA.empty_table()
    if example_id is not None:
        table = table.filter(pc.field("example_id") == example_id)
    lengths = table["token_ids"].combine_chunks().value_lengths() if len(table) else []
    if max((length.as_py() for length in lengths), default=0) > TOKENS:
        raise ValueError(f"has a document of more than {TOKENS:,} tokens")
    return table


def _groups_with(file: pq.ParquetFile, record: FileRecord, example_id: int | None) -> list[int]:
    """The row groups that may have the document, or all; raises ValueError where a footer is not that of our file."""
    footer = file.metadata
    if file.schema_arrow.remove_metadata() != SCHEMA:
        raise ValueError(f"does not have the columns {', '.join(SCHEMA.names)}")
    if footer.num_rows != record.rows:
        raise ValueError(f"has {footer.num_rows:,} documents, the manifest says {record.rows:,}")
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    chosen = [n for n, group in enumerate(groups) if example_id is None or may_have(group, example_id)]
    n_tokens = sum(groups[n].column(1).num_values for n in chosen)
    if n_tokens > WORTH_ASKING and 12 * n_tokens > (there := available_memory()):
        raise ValueError(f"stands for {n_tokens:,} tokens, for which the {size(there)} of memory are too little")
    return chosen


def example_ids(folder: Path, record: FileRecord) -> frozenset[int]:
    """The documents in a file; raises as `read_tokens`."""
    with parquet(folder / record.path) as file:
        _groups_with(file, record, -1)
        return frozenset(file.read(columns=["example_id"])["example_id"].to_pylist())
