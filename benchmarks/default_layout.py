"""What our layout is compared with: one file per head, by pyarrow's defaults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sniffer.forward.columns import Columns


def write_heads(folder: Path, layer: int, kind: str, columns: Columns) -> None:
    """Files named l00h00q.parquet, with the columns bucket, example_id, position and vector."""
    folder.mkdir(parents=True, exist_ok=True)
    n_heads = len(columns.heads)
    vectors = torch.cat(columns.vectors).float().numpy().reshape(len(columns), n_heads, columns.dim)
    for place, head in enumerate(columns.heads):
        floats = pa.array(np.ascontiguousarray(vectors[:, place]).reshape(-1))
        table = pa.table(
            {
                "bucket": columns.rows.bucket,
                "example_id": columns.rows.example_id,
                "position": columns.rows.position,
                "vector": pa.FixedSizeListArray.from_arrays(floats, columns.dim),
            }
        )
        pq.write_table(table, folder / head_file(layer, kind, head))


def head_file(layer: int, kind: str, head: int) -> str:
    return f"l{layer:02d}h{head:02d}{kind}.parquet"


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.parquet"))
