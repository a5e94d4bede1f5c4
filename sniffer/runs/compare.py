"""`runs compare A B`: how far apart two runs are, where both have a row of the same text, position and head.

Two precisions of one model, with an adapter and without, two engines or two versions: what each captured at the same
place is compared, layer by layer and kind by kind, and what differs between the two environments is told beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float64
from rich.table import Table

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.reproduce import difference, elsewhere
from sniffer.terminal.printing import Grid
from sniffer.types import ATTENTION, UNKNOWN_TOKEN, Column

KEY = ("head", "example_id", "position")
SCHEMA = {
    "layer": pl.Int32,
    "kind": pl.String,
    "statistic": pl.String,
    "rows": pl.Int64,
    "only_first": pl.Int64,
    "only_second": pl.Int64,
    "other_token": pl.Int64,
    "mean": pl.Float64,
    "median": pl.Float64,
    "largest": pl.Float64,
    "cosine": pl.Float64,
    "head": pl.Int32,
}
SHOWN = 40
"""Lines that a terminal gets; a file has all of them."""


def compare(first: Run, second: Run) -> pl.DataFrame:
    """By layer and kind, and by statistic of attention: rows of both, rows of one, and how far apart they are.

    Columns: layer, kind; `statistic` of attention, null for vectors; `rows` in both runs, of the same token as far as
    tokens are known;
    `only_first`, `only_second`; `other_token`: at the same place, of another token, which are left out. Of the others
    `mean`, `median` and `largest` distance: of vectors the length of their difference over that of the first, of
    statistics the absolute difference; `cosine`, the mean of vectors' (null where one has no length); `head` with the
    largest mean distance. A number that is not finite is no difference where both have it, and else one without bound.

    Raises:
        RunError: the runs have no document, or no layer and kind, in common.
    """
    shared = sorted(first.all_captured & second.all_captured)
    if not shared:
        raise RunError(f"{first.folder} and {second.folder} have no layer and kind in common")
    texts = [set(run.examples()["example_id"].to_list()) for run in (first, second)]
    if not texts[0] & texts[1]:
        raise RunError(
            f"{first.folder} and {second.folder} have no document in common: documents are the same by their ids, so "
            "capture both from one dataset"
        )
    rows = [line for layer, kind in shared for line in _of_pair(first, second, layer, kind)]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def _of_pair(first: Run, second: Run, layer: int, kind: str) -> Iterator[tuple[object, ...]]:
    for run in (first, second):
        run.check(layer, kind)
    columns = [run.manifest.columns(layer, kind) for run in (first, second)]
    names = [column.name for column in columns[0] if column in columns[1]]
    tables = [run.scan(kind=kind, layers=[layer]).select(*KEY, "token_id", *names).collect() for run in (first, second)]
    both = tables[0].join(tables[1], on=KEY, suffix="_other")
    alone = tables[0].height - both.height, tables[1].height - both.height
    tokens = pl.col("token_id"), pl.col("token_id_other")
    unknown = (tokens[0] == UNKNOWN_TOKEN) | (tokens[1] == UNKNOWN_TOKEN)
    same = both.filter((tokens[0] == tokens[1]) | unknown)
    told = len(same), *alone, len(both) - len(same)
    heads = same["head"].to_numpy()
    for column in (column for column in columns[0] if column.name in names):
        statistic = None if kind != ATTENTION else column.name
        one, other = (_numbers(same, column, suffix) for suffix in ("", "_other"))
        distance, cosine = _relative(one, other) if kind != ATTENTION else (_absolute(one, other), None)
        yield layer, kind, statistic, *told, *_summed(distance), cosine, _worst(heads, distance)
    if not names:  # vectors of other lengths
        yield layer, kind, None, *told, None, None, None, None, None


def _numbers(table: pl.DataFrame, column: Column, suffix: str) -> Float64[np.ndarray, "rows numbers"]:
    return table[column.name + suffix].to_numpy().reshape(len(table), column.values).astype(np.float64)


def _relative(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, float | None]:
    lengths = np.linalg.norm(np.nan_to_num(one, posinf=0.0, neginf=0.0), axis=1)
    apart = np.linalg.norm(difference(one, other), axis=1)
    distance = np.divide(apart, lengths, out=np.where(apart > 0, np.inf, 0.0), where=lengths > 0)
    both = lengths * np.linalg.norm(other, axis=1)
    usable = np.isfinite(both) & (both > 0)
    cosine = (one[usable] * other[usable]).sum(1) / both[usable]
    return distance, float(cosine.mean()) if len(cosine) else None


def _absolute(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(difference(one, other)).max(axis=1, initial=0.0)


def _summed(distance: Float64[np.ndarray, " rows"]) -> tuple[float | None, ...]:
    if not len(distance):
        return None, None, None
    return float(distance.mean()), float(np.median(distance)), float(distance.max())


def _worst(heads: np.ndarray, distance: np.ndarray) -> int | None:
    found = {int(head): float(distance[heads == head].mean()) for head in np.unique(heads)}
    return max(found, key=lambda head: found[head]) if found else None


def told(first: Path, second: Path, target: Path | None = None) -> tuple[Table, list[str]]:
    """The comparison of two run folders as a table, and what else there is to say, line by line.

    Args:
        target: a Parquet file that gets all of it.

    Raises:
        RunError: as `compare`; one is no run folder, or the file exists.
    """
    runs = [open_run(folder) for folder in (first, second)]
    for run in runs:
        if not isinstance(run, Run):
            raise RunError(f"{run.folder} is a folder of several runs: give one of them")
    one, other = (run for run in runs if isinstance(run, Run))
    if target is not None and target.exists():
        raise RunError(f"{target} exists already: choose another file with --to")
    table = compare(one, other)
    lines = [_differing(one, other)]
    if target is not None:
        table.write_parquet(target)
        lines.append(f"all {len(table):,} lines are in {target}")
    elif len(table) > SHOWN:
        lines.append(f"{len(table) - SHOWN} more lines: --to FILE.parquet has all of them")
    return _grid(table.head(SHOWN)), lines


def _differing(one: Run, other: Run) -> str:
    """What the manifests have otherwise; of an import nothing is known."""
    if imported := [str(run.folder) for run in (one, other) if run.manifest.imported]:
        were = "was imported" if len(imported) == 1 else "were imported"
        return (
            f"what differs is not known: {' and '.join(imported)} {were}, and documents are the same by their ids alone"
        )
    lines = [
        line.replace(" then, ", " in A, ").removesuffix(" now") + " in B"
        for line in elsewhere(one.manifest, other.manifest)
    ]
    return "what differs: " + ("; ".join(lines) or "nothing that is recorded")


TITLES = {"only_first": "only A", "only_second": "only B", "other_token": "other token", "head": "worst head"}


def _grid(table: pl.DataFrame) -> Table:
    named = [name for name in table.columns if name != "statistic" or table["statistic"].null_count() < len(table)]
    grid = Grid(title="B's distance from A, of rows in both (vectors: over A's length; statistics: absolute)")
    for name in named:
        grid.add_column(TITLES.get(name, name), justify="left" if name in ("kind", "statistic") else "right")
    for row in table.iter_rows(named=True):
        grid.add_row(*(_cell(row[name]) for name in named))
    return grid


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
