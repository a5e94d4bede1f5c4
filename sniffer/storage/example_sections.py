"""The column `sections` of examples.parquet: written, and read again as anyone may have written it.

Of every document it has the stretches of tokens that belong to some section, in order. Where they begin and end is
neither compressed nor replaced by codes, so that the file weighs eight bytes or more for each: what stands for more
than that is not ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sniffer.storage.schema import SECTIONS
from sniffer.types import NONE, Names, Sections

LEAF = f"{SECTIONS.name}.list.element"
BOUNDS, LABEL = (f"{LEAF}.start", f"{LEAF}.end"), f"{LEAF}.label"

EMPTY = (np.empty(0, np.int32), np.empty(0, np.int32), Names((), np.empty(0, np.int32)))


def with_sections(table: pa.Table, documents: Sequence[Sections | None]) -> tuple[pa.Table, dict[str, Any]]:
    """A table of documents with their sections beside it, and how pyarrow is to write it."""
    found = [EMPTY if sections is None else sections.stretches() for sections in documents]
    starts, ends = (np.concatenate([EMPTY[0], *(one[place] for one in found)]) for place in (0, 1))
    names = Names.joined([names for *_, names in found])
    labels = pa.DictionaryArray.from_arrays(names.codes, pa.array(names.known, pa.string())).cast(pa.string())
    columns = [pa.array(starts), pa.array(ends), labels]
    offsets = pa.array(np.cumsum([0, *(len(names) for *_, names in found)]), pa.int32())
    stretches = pa.StructArray.from_arrays(columns, fields=list(SECTIONS.type.value_field.type))
    column = pa.ListArray.from_arrays(offsets, stretches, type=SECTIONS.type)
    others = table.schema.names
    options = {
        "compression": {**dict.fromkeys([*others, LABEL], "zstd"), **dict.fromkeys(BOUNDS, "none")},
        "use_dictionary": [*others, LABEL],
    }
    return table.append_column(SECTIONS, column), options


def require_honest(footer: pq.FileMetaData, size: int) -> None:
    """Raises ValueError where a small file stands for more stretches, or generated tokens, than it can hold."""
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            name, _, inner = column.path_in_schema.partition(".")
            if inner and column.num_values > size:
                what = "stretches of sections" if name == SECTIONS.name else "generated tokens"
                raise ValueError(f"has {size:,} bytes that stand for {column.num_values:,} {what}")


def sections_of(table: pa.Table) -> list[Sections | None]:
    """Of each document in a table as it was read; None where the run has no sections.

    Raises:
        ValueError: stretches that overlap, are empty, unnamed, or lie outside their document.
    """
    if SECTIONS.name not in table.schema.names:
        return [None] * len(table)
    starts, ends, labels, offsets = _flat(table)
    if NONE in labels.known:
        raise ValueError("has a section without a name")
    lengths = table["n_tokens"].to_numpy()
    return [
        _document(starts[first:last], ends[first:last], labels[first:last], int(length))
        for first, last, length in zip(offsets, offsets[1:], lengths, strict=False)
    ]


def _flat(table: pa.Table) -> tuple[np.ndarray, np.ndarray, Names, np.ndarray]:
    """Starts, ends and labels of all stretches, and where those of each document begin."""
    column = table[SECTIONS.name].combine_chunks()
    stretches = column.flatten()
    offsets = np.concatenate([[0], np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))])
    starts, ends = (stretches.field(name).to_numpy() for name in ("start", "end"))
    return starts, ends, Names.from_column(stretches.field("label")), offsets


def _document(starts: np.ndarray, ends: np.ndarray, labels: Names, n_tokens: int) -> Sections:
    # Of 9 tokens, 2-5 and 5-7: bounds 0, 2, 2, 5, 5, 7, 7, 9 enclose stretches of none before, between and behind them.
    bounds = np.stack([starts, ends], axis=1).ravel() if len(starts) else np.empty(0, np.int64)
    bounds = np.concatenate([[0], bounds, [n_tokens]])
    if (np.diff(bounds) < 0).any() or (starts >= ends).any():
        raise ValueError("has sections that overlap, are empty, or lie outside their document")
    codes = np.zeros(2 * len(labels) + 1, dtype=np.int32)
    codes[1::2] = labels.codes + 1
    stretches = np.diff(bounds) > 0
    return Sections.of_stretches((NONE, *labels.known), codes[stretches], bounds[1:][stretches])


def tokens_by_section(table: pa.Table) -> dict[str, int]:
    """Tokens of all documents together by section, those of none left out; nothing where there are no sections."""
    if SECTIONS.name not in table.schema.names:
        return {}
    starts, ends, labels, _ = _flat(table)
    counts = np.bincount(labels.codes, weights=ends - starts, minlength=len(labels.known))
    return {name: int(count) for name, count in zip(labels.known, counts, strict=True)}
