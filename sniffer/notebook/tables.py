"""Rows in memory as frames, with the columns that a run's have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from sniffer.storage.schema import to_arrow
from sniffer.types import SECTION, Column, Rows

if TYPE_CHECKING:
    import polars as pl

Values = Float32[np.ndarray, "rows numbers"]


def rows_frame(layer: int, kind: str, head: int, rows: Rows, columns: Sequence[Column], values: Values) -> pl.DataFrame:
    """As `run.scan` has them."""
    import polars as pl

    place = {"layer": pl.lit(layer, pl.Int16), "kind": pl.lit(kind), "head": pl.lit(head, pl.Int16)}
    known = _known(rows)
    return _with_values(known.with_columns(**place).select(*place, *known.columns), columns, values)


def statistics_frame(rows: Rows, columns: Sequence[Column], values: Values) -> pl.DataFrame:
    """As `run.attention` has them."""
    named = ["example_id", "position", "bucket", "token_id", *([] if rows.section is None else [SECTION])]
    return _with_values(_known(rows).select(named), columns, values)


def _known(rows: Rows) -> pl.DataFrame:
    import polars as pl

    section = {} if rows.section is None else {SECTION: rows.section.array.tolist()}
    return pl.DataFrame({**rows.columns(), **section})


def _with_values(frame: pl.DataFrame, columns: Sequence[Column], values: Values) -> pl.DataFrame:
    import polars as pl

    first, found = 0, []
    for column in columns:
        numbers = np.ascontiguousarray(values[:, first : first + column.values])
        found.append(pl.Series(column.name, pl.from_arrow(to_arrow(column, numbers))))
        first += column.values
    return frame.with_columns(found)
