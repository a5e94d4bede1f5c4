"""The columns `generated` and `end` of examples.parquet: what a model has written, and why it wrote no more.

Token ids are neither compressed nor replaced by codes, so that the file weighs four bytes or more for each: what
stands for more than that is not ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sniffer.storage.schema import END, GENERATED, SECTIONS, Example
from sniffer.types import ENDS, Generated

LEAF = f"{GENERATED.name}.list.element"


def with_generated(table: pa.Table, examples: Sequence[Example], options: dict[str, Any]) -> pa.Table:
    """A table of documents with what was generated of each beside it; `options`, as pyarrow is to write it, follow."""
    found = [example.generated or Generated(np.empty(0, np.int32), ENDS[-1]) for example in examples]
    starts = pa.array(np.cumsum([0, *map(len, found)]), pa.int32())
    ids = np.concatenate([np.empty(0, np.int32), *(one.token_ids for one in found)]).astype(np.int32)
    column = pa.ListArray.from_arrays(starts, pa.array(ids), type=GENERATED.type)
    if not isinstance(options["compression"], dict):
        options["compression"] = dict.fromkeys(table.schema.names, options["compression"])
    options["compression"] |= {LEAF: "none", END.name: "zstd"}
    known = options.get("use_dictionary", table.schema.names)
    options["use_dictionary"] = [*known, END.name]
    ends = pa.array([one.end for one in found], pa.string())
    return table.append_column(GENERATED, column).append_column(END, ends)


def generated_of(table: pa.Table) -> list[Generated | None]:
    """Of each document in a table as it was read; None where the run has generated nothing.

    Raises:
        ValueError: more tokens than the document has, a token that is none, or another end than there is.
    """
    if GENERATED.name not in table.schema.names:
        return [None] * len(table)
    column = table[GENERATED.name].combine_chunks()
    lengths, ids = column.value_lengths().to_numpy(zero_copy_only=False), column.flatten().to_numpy()
    if (lengths > table["n_tokens"].to_numpy()).any() or (ids < 0).any():
        raise ValueError("has documents of which more was generated than they have, or tokens below 0")
    ends = table[END.name].to_pylist()
    if not set(ends) <= set(ENDS):
        raise ValueError(f"has ends that are none of {', '.join(ENDS)}")
    pieces = np.split(ids.astype(np.int32), np.cumsum(lengths)[:-1]) if len(table) else []
    return [Generated(piece, end) for piece, end in zip(pieces, ends, strict=True)]


def without_generated(table: pa.Table) -> pa.Table:
    """The columns that every run's documents have."""
    return table.drop_columns([one.name for one in (SECTIONS, GENERATED, END) if one.name in table.schema.names])
