"""Reading a run of real documents back, against one default file per head, both by polars."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import torch

from benchmarks.default_layout import head_file, write_heads
from benchmarks.measure import Figure, figure, timed, whole_run
from sniffer import open_run
from sniffer.reader import Run
from sniffer.schema import Columns

TEXT = ("dataset=sotu", "dataset.max_examples=8", "dataset.max_tokens=2048", "sampler=all")
MANY_LAYERS = (
    "model=llama3",
    "model.weights=random",
    "model.config_overrides={num_hidden_layers: 80, hidden_size: 32, intermediate_size: 32, num_attention_heads: 2,"
    " num_key_value_heads: 1, head_dim: 16, vocab_size: 49152}",
    "dataset=pydoc",
    "dataset.max_examples=2",
    "dataset.max_tokens=256",
)
LAYER = 15
FIRST = 128
"""Positions that a bucket query asks for: the first bucket."""


def measure(repeats: int) -> list[Figure]:
    one_head, one_layer, all_layers, opening = [], [], [], []
    with TemporaryDirectory() as scratch:
        whole_run(Path(scratch, "run"), *TEXT)
        whole_run(Path(scratch, "many"), *MANY_LAYERS)
        run, default = open_run(Path(scratch, "run")), Path(scratch, "default")
        assert isinstance(run, Run)
        _as_default(run, default)
        for _ in range(repeats):
            _, ours = timed(run.vectors, layer=LAYER, head=4, kind="q")
            _, theirs = timed(_default_head, default, LAYER, 4)
            one_head.append(ours.wall / theirs.wall)
            mine, ours = timed(_first_bucket, run, (LAYER,))
            same, theirs = timed(_default_bucket, default, run, (LAYER,))
            assert len(mine) == len(same)
            one_layer.append(ours.wall / theirs.wall)
            mine, ours = timed(_first_bucket, run, run.layers)
            same, theirs = timed(_default_bucket, default, run, run.layers)
            assert len(mine) == len(same)
            all_layers.append(ours.wall / theirs.wall)
            _, opened = timed(open_run, Path(scratch, "many"))
            opening.append(1000 * opened.wall)
        rows = len(run.vectors(layer=LAYER, head=4, kind="q").positions)
    return [
        figure(f"one head of {rows:,} vectors / a default file per head", one_head, limit=0.6),
        figure(f"first {FIRST} positions, q of a layer / default files", one_layer, limit=0.3),
        figure(f"first {FIRST} positions, q of all layers / default files", all_layers),
        figure("opening a run of 160 files", opening, unit="ms"),
    ]


def _first_bucket(run: Run, layers: tuple[int, ...]) -> pl.DataFrame:
    rows = run.scan(layers=layers, kinds=["q"]).filter(pl.col("bucket") == 0)
    return rows.select("head", "position", "vector").collect()


def _default_bucket(folder: Path, run: Run, layers: tuple[int, ...]) -> pl.DataFrame:
    files = [folder / head_file(layer, "q", head) for layer in layers for head in run.heads(layer, "q")]
    rows = pl.scan_parquet(files, include_file_paths="file").filter(pl.col("bucket") == 0)
    return rows.select("file", "position", "vector").collect()


def _default_head(folder: Path, layer: int, head: int) -> np.ndarray:
    return pl.read_parquet(folder / head_file(layer, "q", head))["vector"].to_numpy()


def _as_default(run: Run, folder: Path) -> None:
    """The same queries, one file per head."""
    for layer in run.layers:
        for head in run.heads(layer, "q"):
            one = run.vectors(layer=layer, head=head, kind="q")
            chunk = [torch.from_numpy(one.vectors.copy())]
            places = (one.buckets, one.positions, one.token_ids, one.example_ids)
            columns = Columns((head,), chunk, *places, dim=one.vectors.shape[1])
            write_heads(folder, layer, "q", columns)
