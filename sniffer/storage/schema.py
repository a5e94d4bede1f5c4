"""What a captured row looks like on disk.

A *part* is one Parquet file with rows of one (layer, kind): its path says which, its footer says under which law they
were sampled. `Part` is what the manifest remembers of the file. Adding a footer key or a manifest key keeps
SCHEMA_VERSION; changing the meaning of what is there raises it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from sniffer.storage.finite import NotFinite
from sniffer.storage.layout import RunFolder
from sniffer.types import ROW_DTYPES, SECTION, Column, Document, Generated, Sections

SCHEMA_VERSION = 1
FOOTER_KEY = b"sniffer"
METADATA_COLUMNS = ("head", *ROW_DTYPES)
"""Of every part; those of runs with sections also have SECTION."""

EXAMPLES_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.int64(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
)

WINDOWS_SCHEMA = pa.schema(
    [*EXAMPLES_SCHEMA, pa.field("source", pa.string(), nullable=False), pa.field("offset", pa.int64(), nullable=False)]
)
"""Where documents are windows of longer texts: which text, and from which of its tokens on."""

FIRST = pa.field("first_position", pa.int32(), nullable=False)
"""Where rows of some documents are of their last tokens alone, those of this position and behind it."""

SPAN = {"start": pa.int32(), "end": pa.int32(), "label": pa.string()}
"""A stretch of a document: from which token to before which other, and the name of its section."""

SECTIONS = pa.field(
    "sections",
    pa.list_(pa.field("element", pa.struct([pa.field(*one, nullable=False) for one in SPAN.items()]), nullable=False)),
    nullable=False,
)
"""Where documents have sections: all stretches that belong to some, in order."""

GENERATED = pa.field("generated", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False)
END = pa.field("end", pa.string(), nullable=False)
"""Where a model has gone on with documents: their last tokens, which it wrote, and why it wrote no more."""


@dataclass(frozen=True)
class Footer:
    """What a part's own footer says of it, so that a lone file still explains itself.

    `source_dtype` is the model's dtype before widening to float32, such as "bfloat16"; `sampler` the
    sampler's class and fields.
    """

    layer: int
    kind: str
    dim: int
    source_dtype: str
    sliding_window: int | None
    scaling: float | None
    sampler: Mapping[str, Any]
    seed: int
    seed_by: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION

    def encode(self) -> dict[bytes, bytes]:
        """As Parquet's key-value metadata."""
        return {FOOTER_KEY: json.dumps(asdict(self), sort_keys=True).encode()}

    @classmethod
    def decode(cls, metadata: Mapping[bytes, bytes]) -> Footer:
        """From Parquet's key-value metadata; keys that a later release added are left out.

        Raises:
            KeyError, TypeError, ValueError: the file is not one of ours.
        """
        try:
            values = json.loads(metadata[FOOTER_KEY])
        except RecursionError:
            raise ValueError("its footer is nested too deep") from None
        values["seed_by"] = tuple(values["seed_by"])
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Example:
    """A row of examples.parquet: the text that an example_id stands for; of a window, the text that it is of.

    What a model has written of it is `generated`, its last tokens. Rows and moments are of the positions from
    `first_position` on: what is before was computed for another document, from which this one parts.
    """

    example_id: int
    source_id: str
    n_tokens: int
    truncated: bool
    source: str | None = None
    offset: int | None = None
    sections: Sections | None = None
    generated: Generated | None = None
    first_position: int = 0

    @classmethod
    def of(cls, document: Document) -> Example:
        known = document.example_id, document.source_id, document.n_tokens, document.truncated
        return cls(*known, document.source, document.offset, document.sections, document.generated)

    @property
    def prompt(self) -> Example:
        """The same without what was generated."""
        if self.generated is None:
            return self
        n_tokens = self.n_tokens - len(self.generated)
        sections = None if self.sections is None else self.sections.cut(0, n_tokens)
        return replace(self, n_tokens=n_tokens, sections=sections, generated=None)


def generated_in(examples: Iterable[Example]) -> int:
    """Tokens that a model has written, of all these."""
    return sum(len(example.generated) for example in examples if example.generated is not None)


@dataclass(frozen=True)
class FileRecord:
    """A file that counts: `path` is relative to the run folder, with forward slashes."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part(FileRecord):
    """A written part. `digest` stands for its set of rows (see digest.py); `buckets` are rows per bucket.

    Parts of one `commit`, counted from 0, hold the same documents. How many rows hold a number that is not finite
    (see finite.py) is None where an early release wrote the part and did not count. `sections` are rows per section, if
    the run has sections and these are no more than MOST_SECTIONS.
    """

    layer: int
    kind: str
    digest: str
    buckets: Mapping[int, int]
    commit: int = 0
    rows_with_nan: int | None = None
    rows_with_infinity: int | None = None
    sections: Mapping[str, int] | None = None

    @property
    def not_finite(self) -> NotFinite | None:
        """None where nobody has counted."""
        if self.rows_with_nan is None or self.rows_with_infinity is None:
            return None
        return NotFinite(self.rows_with_nan, self.rows_with_infinity)

    @property
    def number(self) -> int:
        """Among the parts of its (layer, kind), as its name says."""
        return RunFolder.part_number(self.path)


MOST_SECTIONS = 256
"""That a part is counted by; documents packed together have one for each text."""


def row_schema(columns: Sequence[Column], sections: bool = False) -> pa.Schema:
    """The Arrow schema of a part whose values are in these columns; none may hold a null."""
    return pa.schema(
        [
            pa.field("head", pa.int16(), nullable=False),
            *(pa.field(name, pa.from_numpy_dtype(dtype), nullable=False) for name, dtype in ROW_DTYPES.items()),
            *([pa.field(SECTION, pa.string(), nullable=False)] if sections else []),
            *(pa.field(column.name, arrow_type(column), nullable=False) for column in columns),
        ]
    )


def arrow_type(column: Column) -> pa.DataType:
    one = pa.int32() if column.whole else pa.float32()
    return one if column.width is None else pa.list_(pa.field("element", one, nullable=False), column.width)


def leaf(column: Column) -> str:
    """Parquet's path of a column's numbers. Encodings set on any other spelling are silently ignored."""
    return column.name if column.width is None else f"{column.name}.list.element"


def to_arrow(column: Column, values: Float32[np.ndarray, "rows numbers"]) -> pa.Array:
    """One column, from its numbers in every row."""
    flat = values.reshape(-1)
    numbers = pa.array(flat.astype(np.int32) if column.whole else flat)
    return numbers if column.width is None else pa.FixedSizeListArray.from_arrays(numbers, type=arrow_type(column))


def from_arrow(columns: Sequence[Column], table: pa.Table) -> Float32[np.ndarray, "rows numbers"]:
    """The numbers of all columns side by side, as they were before they were written."""
    found = [_numbers(column, table[column.name].combine_chunks(), table.num_rows) for column in columns]
    return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def _numbers(column: Column, values: pa.Array, rows: int) -> Float32[np.ndarray, "rows numbers"]:
    flat = values if column.width is None else values.flatten()
    numbers: np.ndarray = flat.to_numpy(zero_copy_only=False)
    return numbers.astype(np.float32, copy=False).reshape(rows, column.values)
