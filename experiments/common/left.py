"""What analyses left beside a run: the tables of heads that are still of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from sniffer.errors import RunError, first_line
from sniffer.reader.run import Run
from sniffer.storage.untrusted import CONFIG_BYTES, read_json

from .results import PROVENANCE

HEADS = "heads.parquet"
NOT_STATISTICS = ("layer", "head", "key_head", "dim", "rows", "rows_q", "rows_k", "residual_r", "repeated")
"""Columns that say which head it is and how much there was of it, or what is 0 but for rounding."""


def query_head_tables(run: Run) -> Iterator[tuple[str, pl.DataFrame]]:
    """Analysis by analysis: its table of query heads, where these rows gave it.

    Raises:
        RunError: a table cannot be read.
    """
    for path in sorted((run.folder / "experiments").glob(f"*/{HEADS}")):
        if not of_these_rows(path.parent, run):
            continue
        try:
            table = pl.read_parquet(path.read_bytes())
        except (OSError, pl.exceptions.PolarsError) as error:
            raise RunError(f"could not read {path}: {first_line(error)}; run that analysis again") from error
        if "kind" in table.columns:
            table = table.filter(pl.col("kind").is_in(["q", "q_pre"]))
        if len(table):
            yield path.parent.name, table


def of_these_rows(folder: Path, run: Run) -> bool:
    """Whether a folder of results is of all rows that the run has now."""
    try:
        told = read_json(folder / PROVENANCE, CONFIG_BYTES)
        settings = told["settings"]
        return bool(told["run_digest"] == run.manifest.digest and not settings.get("sections"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
