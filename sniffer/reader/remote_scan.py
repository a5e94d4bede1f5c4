"""Lazy scans over parts at a URL: polars hands over what a query asks for, and only that is fetched.

A filter is taken apart into what must all hold. Each of these is tried on what is known before a row is read: the layer
and kind of a part, from the manifest; the head, and the smallest and largest bucket and position of a row group, from
the part's footer. Where one cannot hold, the file is not opened, or the row group not fetched. What is fetched is
filtered as a whole, so nothing rests on that but how much is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Bool
from polars.io.plugins import register_io_source

from sniffer.errors import RunError, first_line
from sniffer.reader.cut import cut
from sniffer.reader.scan import Contents, Span, contents_at, part_file, row_schema
from sniffer.storage.schema import Part
from sniffer.types import SECTION, Column

TOGETHER = 64 << 20
"""Bytes of row groups, as they lie in the file, that are fetched at a time."""

WIDEST = 1 << 24
"""Between the smallest and the largest value that a condition is tried on one by one."""


def scan_remote(
    folder: Path, parts: Sequence[Part], columns_of_values: Sequence[Column], sections: bool = False
) -> pl.LazyFrame:
    """As `scan.scan_parts`: the rows of parts whose values have the same columns."""
    schema = row_schema(columns_of_values, sections)

    def source(
        columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, _: int | None
    ) -> Iterator[pl.DataFrame]:
        columns = schema.names() if columns is None else columns
        left = n_rows
        # A limit is of rows as they lie there, before any filter.
        conditions = [] if predicate is None or left is not None else list(conjuncts(predicate))
        more = [] if predicate is None else predicate.meta.root_names()
        for frame in _frames(folder, parts, schema, {*columns, *more}, conditions):
            found = frame if left is None else frame.head(left)
            yield (found if predicate is None else found.filter(predicate)).select(columns)
            if left is not None and (left := left - len(found)) <= 0:
                return

    return register_io_source(source, schema=schema, is_pure=True)


def _frames(
    folder: Path, parts: Sequence[Part], schema: pl.Schema, wanted: Collection[str], needed: Sequence[pl.Expr]
) -> Iterator[pl.DataFrame]:
    """What may have rows that meet what is `needed`, some row groups at a time, with the columns that are wanted."""
    conditions = [Condition(one, schema) for one in needed]
    in_file = [name for name in schema.names() if name in wanted and name not in ("layer", "kind")] or ["head"]
    known = pl.DataFrame(
        {"layer": [part.layer for part in parts], "kind": [part.kind for part in parts]},
        schema={name: schema[name] for name in ("layer", "kind")},
    )
    chosen = np.logical_and.reduce([np.ones(len(parts), bool), *(one.of_constants(known) for one in conditions)])
    for part in (part for part, may in zip(parts, chosen, strict=True) if may):
        constants = [pl.lit(getattr(part, name), dtype=schema[name]).alias(name) for name in known.columns]
        try:
            contents = contents_at(folder / part.path)
            groups = _groups(contents, part, conditions, schema)
            with part_file(folder / part.path, SECTION in schema, contents.metadata) as file:
                sizes = {group: contents.metadata.row_group(group).total_byte_size for group in groups}
                for some in cut(groups, TOGETHER, sizes.__getitem__):
                    table = file.read_row_groups(some, columns=in_file)
                    frame = pl.DataFrame(pl.from_arrow(table)).select(pl.col(n).cast(schema[n]) for n in in_file)
                    yield frame.with_columns(constants)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise RunError(
                f"could not read {folder / part.path}: {first_line(error)}; python -m sniffer.runs verify {folder} "
                "tells more"
            ) from error


def _groups(contents: Contents, part: Part, conditions: Sequence[Condition], schema: pl.Schema) -> list[int]:
    """The row groups that may have rows that are wanted."""
    spans = contents.spans
    if not spans:
        return []
    same = {name: [first if first == last else None for first, last in _of(spans, name)] for name in spans[0]}
    constants = {"layer": [part.layer] * len(spans), "kind": [part.kind] * len(spans), **same}
    known = pl.DataFrame(constants, schema={name: schema[name] for name in constants})
    may = np.ones(len(spans), bool)
    for one in conditions:
        may &= one.of_constants(known)
        for name in ("bucket", "position"):
            may &= one.of_spans(name, _of(spans, name))
    return np.flatnonzero(may).tolist()


def _of(spans: Sequence[Mapping[str, Span]], name: str) -> list[Span]:
    return [one[name] for one in spans]


def conjuncts(predicate: pl.Expr) -> Iterator[pl.Expr]:
    """The conditions of a filter that must all hold; itself where it is no `and` of others."""
    inputs = predicate.meta.pop()
    if len(inputs) == 2 and predicate.meta.eq(inputs[1] & inputs[0]):
        inputs.reverse()
    if len(inputs) == 2 and predicate.meta.eq(inputs[0] & inputs[1]):
        for one in inputs:
            yield from conjuncts(one)
    else:
        yield predicate


class Condition:
    """A condition, and where it cannot hold, as far as that is told by less than the rows."""

    def __init__(self, condition: pl.Expr, schema: pl.Schema) -> None:
        self._condition, self._schema = condition, schema
        self._names = set(condition.meta.root_names())

    def of_constants(self, known: pl.DataFrame) -> Bool[np.ndarray, " n"]:
        """Whether it may hold in each of some places, of which each has one value, or null where it has several."""
        if not self._names or not self._names <= set(known.columns):
            return np.ones(len(known), bool)
        several = known.select(pl.any_horizontal(pl.lit(False), *(pl.col(name).is_null() for name in self._names)))
        holds = known.select(self._condition.fill_null(False).alias("holds"))["holds"]
        return np.asarray(holds.to_numpy() | several.to_series().to_numpy())

    def of_spans(self, name: str, spans: Sequence[Span]) -> Bool[np.ndarray, " n"]:
        """Whether it may hold in each of some places, given the smallest and largest value of a column there."""
        first, last = min(one for one, _ in spans), max(one for _, one in spans)
        if self._names != {name} or not last - first < WIDEST:
            return np.ones(len(spans), bool)
        values = pl.DataFrame(
            {name: pl.int_range(first, last + 1, dtype=pl.Int64, eager=True).cast(self._schema[name])}
        )
        holds: Any = values.select(self._condition.fill_null(False).alias("holds"))["holds"].to_numpy()
        count = np.concatenate(([0], np.cumsum(holds)))
        return np.array([count[b - first + 1] > count[a - first] for a, b in spans], bool)
