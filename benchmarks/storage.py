"""Writing and reading back: our layout against one file per head with Parquet's defaults."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measure import Figure, figure, timed
from sniffer.schema import Columns, Footer, part_path
from sniffer.writer import write_part

HEADS, DIM, POSITIONS, LAYERS = 9, 64, 2048, 4


def measure(repeats: int) -> list[Figure]:
    """Vectors are random with the spread of real ones: float32, and bfloat16 widened."""
    wide, narrow = _columns(torch.float32), _columns(torch.bfloat16)
    values = LAYERS * len(wide) * HEADS * DIM
    speed, size, narrow_size = [], [], []
    with TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            ours, default = Path(scratch, f"ours-{repeat}"), Path(scratch, f"default-{repeat}")
            default.mkdir()
            _, mine = timed(_ours, ours, wide)
            _, theirs = timed(_default, default, wide)
            speed.append(mine.cpu / theirs.cpu)
            size.append(_bytes(ours) / _bytes(default))
            _ours(ours / "narrow", narrow)
            narrow_size.append(_bytes(ours / "narrow") / values)
    return [
        figure("writing, processor time / one default file per head", speed),
        figure("bytes / one default file per head", size),
        figure("bytes per bfloat16 value, stored as float32", narrow_size, limit=1.5, unit="bytes"),
    ]


def _columns(dtype: torch.dtype) -> Columns:
    positions = np.arange(POSITIONS, dtype=np.int32)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(POSITIONS, HEADS * DIM, generator=generator).to(dtype)
    return Columns(
        heads=tuple(range(HEADS)),
        vectors=[vectors],
        buckets=positions // 128,
        positions=positions,
        token_ids=(positions * 7919 % 49152).astype(np.int32),
        example_ids=np.zeros(POSITIONS, dtype=np.int64),
        dim=DIM,
    )


def _ours(folder: Path, columns: Columns) -> None:
    for layer in range(LAYERS):
        footer = Footer(layer, "q", DIM, "float32", None, None, {}, 0, ("example", "layer", "kind"))
        write_part(folder, part_path(layer, "q", 0, LAYERS), columns, footer)


def _default(folder: Path, columns: Columns) -> None:
    vectors = torch.cat(columns.vectors).float().numpy().reshape(len(columns), HEADS, DIM)
    for layer in range(LAYERS):
        for head in range(HEADS):
            floats = pa.array(np.ascontiguousarray(vectors[:, head]).reshape(-1))
            table = pa.table(
                {
                    "bucket": columns.buckets,
                    "example_id": columns.example_ids,
                    "position": columns.positions,
                    "vector": pa.FixedSizeListArray.from_arrays(floats, DIM),
                }
            )
            pq.write_table(table, folder / f"l{layer:02d}h{head:02d}q.parquet")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("captures/**/*.parquet")) or sum(
        file.stat().st_size for file in folder.glob("*.parquet")
    )
