"""Which rows of a dataset are taken: those that a condition holds for, and of these a sample.

A row keeps its number and its identity, whatever is left out around it, so it draws the positions that it draws in the
whole dataset. A sample belongs to the ids: the rows with the smallest hashes of (seed, example_id). So a larger one has
all of a smaller one, and the order of the rows has no say in it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from sniffer.errors import ConfigError, first_line
from sniffer.hashing import key_of

BATCH = 1024
"""Rows that a condition is worked out for at once."""


def sample(rows: Iterable[tuple[int, int]], count: int, seed: int) -> set[int]:
    """The numbers of `count` rows, of (number, example_id); of all where there are not more."""
    drawn = heapq.nsmallest(count, rows, key=lambda row: key_of("shuffle", seed, row[1]))
    return {number for number, _ in drawn}


def matching(where: str, rows: Callable[..., Iterator[tuple[Any, ...]]]) -> Iterator[bool]:
    """Whether a condition holds, row by row; where it is null it does not.

    Args:
        where: a condition in the SQL of polars, such as "length = 'long' AND n > 3".
        rows: gives the columns of these names, of all rows.

    Raises:
        ConfigError: it is none, or does not fit the values of the columns.
        DatasetError: as `rows`.
    """
    import polars as pl

    try:
        condition = pl.sql_expr(where)
        columns = list(dict.fromkeys(condition.meta.root_names()))
    except pl.exceptions.PolarsError as error:
        raise _refusal(where, f"is no SQL condition: {first_line(error)}") from error
    if not columns:
        raise _refusal(where, "names no column")
    values = rows(*columns)
    while batch := list(islice(values, BATCH)):
        try:
            frame = pl.DataFrame(batch, schema=columns, orient="row", infer_schema_length=None, strict=False)
            holds = frame.select(condition).to_series()
        except (pl.exceptions.PolarsError, TypeError) as error:
            raise _refusal(where, f"does not fit the columns {', '.join(columns)}: {first_line(error)}") from error
        if holds.dtype != pl.Boolean and not holds.dtype == pl.Null:
            raise _refusal(where, f"gives a {holds.dtype}, not true or false")
        yield from holds.cast(pl.Boolean).fill_null(False)


def _refusal(where: str, wrong: str) -> ConfigError:
    return ConfigError(f"dataset.where={where} {wrong}; wanted is one such as \"dataset.where='n > 3'\"")
