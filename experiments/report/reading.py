"""Tables of results, which may be anyone's, read with care; and numbers made short for a page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from sniffer.errors import RunError, first_line

MOST_CELLS = 50_000_000
"""Of a table of results: far more than any of ours, or than a page could show."""


def read_table(path: Path) -> pl.DataFrame:
    """Raises RunError where a file is no table, or stands for more than a page could show."""
    try:
        _check(path)
        return pl.read_parquet(path, hive_partitioning=False, glob=False)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise unreadable(path, error) from error


def _check(path: Path) -> None:
    if not path.is_file():
        raise ValueError("it is no plain file")
    footer = pq.read_metadata(path)
    if footer.num_rows * footer.num_columns > MOST_CELLS:
        raise ValueError(f"it has {footer.num_rows:,} rows of {footer.num_columns:,} columns, too many for a page")


def unreadable(path: Path, error: Exception) -> RunError:
    return RunError(f"could not read {path}: {first_line(error)}; run that analysis again")


def short(value: Any) -> Any:
    """Four significant digits are enough for the eye; what is undefined becomes null."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return float(f"{value:.4g}") if isinstance(value, float) else value
