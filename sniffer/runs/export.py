"""`runs export RUN --layout heads`: one file per layer, head and kind, for tools that expect such folders.

l07h03q/data.parquet holds the rows of layer 7, head 3, kind q, with the columns bucket, example_id, position,
vector (list<float32>), sliding_window (null where a layer attends to everything), and section in runs that have some.
Heads of k, v and k_pre are key heads. The folder appears when it is complete.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.storage.documents import refuse_repeated
from sniffer.storage.durable import temporary_for
from sniffer.storage.integrity import damage
from sniffer.storage.layout import RunFolder
from sniffer.storage.made_folder import made
from sniffer.storage.manifest import Manifest
from sniffer.types import SECTION

COLUMNS = ("bucket", "example_id", "position", "vector", "sliding_window")


def export(folder: Path, target: Path) -> int:
    """Writes the `heads` layout of a run into a new folder; returns the number of files.

    Raises:
        RunError: the target exists, or the run cannot be read or is damaged.
        OSError: it cannot be written; nothing is left of it.
    """
    if target.exists():
        raise RunError(f"{target} exists already: choose another folder with --to")
    run = Run(folder, Manifest.load(folder))
    with unfinished(target) as place:
        return write_heads(run, place)


def write_heads(run: Run, place: Path) -> int:
    """Writes the files of all heads into a folder; returns their number.

    Raises:
        RunError: the run cannot be read, or is damaged.
        OSError: a file cannot be written.
    """
    for part in run.manifest.parts:
        if wrong := damage(run.folder, part):
            raise RunError(f"{part.path} {wrong}: `python -m sniffer.runs resume {run.folder}` mends it")
    refuse_repeated(run.folder, run.manifest.parts)
    return sum(_write(run, layer, kind, place) for layer, kind in sorted(run.captured()))


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, which takes its name when the block ends, and is gone if it fails.

    Raises:
        RunError: a folder of its name is there already; it is someone's.
    """
    place = temporary_for(target)
    if place.exists():
        raise RunError(f"{place} is in the way: remove it, or choose another folder with --to")
    with made(place):
        yield place
        place.rename(target)


def _write(run: Run, layer: int, kind: str, place: Path) -> int:
    """The files of one (layer, kind), one per head; returns their number."""
    rows, heads = _rows(run, layer, kind), run.manifest.selection[layer][kind]
    for head in heads:
        file = place / RunFolder.head(layer, head, kind)
        file.parent.mkdir()
        content = io.BytesIO()
        columns = [*COLUMNS, *([SECTION] if run.manifest.has_sections else [])]
        rows.filter(pl.col("head") == head).select(columns).write_parquet(content)
        # Of a full disk the system has plainer words than polars.
        file.write_bytes(content.getvalue())
    return len(heads)


def _rows(run: Run, layer: int, kind: str) -> pl.DataFrame:
    """All heads of one (layer, kind), each in the order (bucket, example_id, position)."""
    run.check(layer, kind)
    window = run.manifest.layer(layer).sliding_window
    rows = run.scan([layer], [kind]).sort("head", "bucket", "example_id", "position")
    return rows.with_columns(
        pl.col("vector").cast(pl.List(pl.Float32)),
        pl.lit(window, dtype=pl.Int32).alias("sliding_window"),
    ).collect()
