"""Lazy scans over parts: polars reads only the files and row groups that a query needs.

The layer and kind of a part are in its path. As hive partitions they let polars skip whole files, which
makes a query for one layer of a hundred cost as much as if there were one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from sniffer.errors import RunError
from sniffer.schema import Part
from sniffer.schema import row_schema as arrow_schema
from sniffer.types import KINDS

PLACES = ("bucket", "position", "token_id", "example_id")

PARTITION = pl.Schema({"layer": pl.Int16(), "kind": pl.Enum(KINDS)})

PLACE = pl.Schema(
    {
        "head": pl.Int16,
        "bucket": pl.Int32,
        "position": pl.Int32,
        "token_id": pl.Int32,
        "example_id": pl.Int64,
    }
)


def row_schema(dim: int | None) -> pl.Schema:
    """The columns of a scan; a vector of no fixed length is a List."""
    vector = pl.List(pl.Float32) if dim is None else pl.Array(pl.Float32, dim)
    return pl.Schema({**PARTITION, **PLACE, "vector": vector})


def scan_parts(folder: Path, parts: Sequence[Part], dim: int) -> pl.LazyFrame:
    """The rows of parts whose vectors have the same length, with layer and kind."""
    schema = row_schema(dim)
    if not parts:
        return pl.LazyFrame(schema=schema)
    if any("=" in name for name in folder.parts):
        return pl.concat([_scan_alone(folder, part) for part in parts])
    paths = [folder / part.path for part in parts]
    in_file = pl.Schema({name: kind for name, kind in schema.items() if name not in PARTITION})
    rows = pl.scan_parquet(paths, glob=False, schema=in_file, hive_partitioning=True, hive_schema=PARTITION)
    return rows.select(schema.names())


def read_rows(folder: Path, parts: Sequence[Part], wanted: pc.Expression, dim: int) -> dict[str, np.ndarray]:
    """The rows of one head of parts, by column, in the order (bucket, example_id, position).

    By pyarrow, which takes a third of polars' time for whole vectors.

    Args:
        wanted: which rows; row groups that cannot hold any are not read.
        dim: of the vectors, which come as a float32 array (rows, dim).

    Raises:
        RunError: a file is missing or damaged.
    """
    schema = arrow_schema(dim)
    # What is wanted lies in one stretch of the file: to fetch it ahead, piece by piece, only costs.
    parquet = ds.ParquetFileFormat(pre_buffer=False)
    try:
        files = ds.dataset([str(folder / part.path) for part in parts], schema=schema, format=parquet)
        table = files.to_table(columns=[*PLACES, "vector"], filter=wanted) if parts else schema.empty_table()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"could not read {folder}: {reason}; python -m sniffer.runs verify {folder} tells more"
        ) from error
    rows = {name: table[name].to_numpy() for name in PLACES}
    vectors = table["vector"].combine_chunks()
    rows["vector"] = vectors.flatten().to_numpy().reshape(-1, dim)
    if len(parts) > 1:
        order = np.lexsort((rows["position"], rows["example_id"], rows["bucket"]))
        rows = {name: column[order] for name, column in rows.items()}
    return rows


def join(frames: Sequence[pl.LazyFrame]) -> pl.LazyFrame:
    """Scans below one another; vectors become Lists where their lengths differ."""
    if not frames:
        return pl.LazyFrame(schema=row_schema(None))
    if len({frame.collect_schema()["vector"] for frame in frames}) > 1:
        frames = [frame.with_columns(pl.col("vector").cast(pl.List(pl.Float32))) for frame in frames]
    return pl.concat(frames)


def _scan_alone(folder: Path, part: Part) -> pl.LazyFrame:
    """One part of a folder whose own path would be taken for partitions too, such as runs/seed=3/.

    polars does not skip files by such constants, so that a query for one layer opens them all.
    """
    rows = pl.scan_parquet(folder / part.path, glob=False, hive_partitioning=False)
    layer = pl.lit(part.layer, dtype=PARTITION["layer"]).alias("layer")
    return rows.select(layer, pl.lit(part.kind, dtype=PARTITION["kind"]).alias("kind"), pl.all())
