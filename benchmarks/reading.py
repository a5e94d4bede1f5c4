"""Reading a run of real documents back, against one default file per head, both by polars."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import torch

from benchmarks.default_layout import head_file, write_heads
from benchmarks.measure import Figure, Timed, both, figure, timed, whole_run
from sniffer import open_run
from sniffer.forward.columns import Columns
from sniffer.reader.run import Run

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
ROUNDS = 5
FIRST = 128
"""Positions that a bucket query asks for: the first bucket."""


def measure(repeats: int) -> list[Figure]:
    one_head, spilled, zipped, of_many, opening, counting = ([] for _ in range(6))
    one_layer: list[Timed] = []
    all_layers: list[Timed] = []
    with TemporaryDirectory() as scratch:
        run, many = _captured(Path(scratch, "run"), *TEXT), _captured(Path(scratch, "many"), *MANY_LAYERS)
        parts = _captured(Path(scratch, "parts"), *TEXT, f"capture.layers={LAYER}", "output.checkpoint_every=1")
        zstd = _captured(Path(scratch, "zstd"), *TEXT, f"capture.layers={LAYER}", "output.compression=zstd")
        default = Path(scratch, "default")
        _as_default(run, default)
        for _ in range(repeats):
            # Some milliseconds each: all heads, one by one, and in turn, so that no single call decides.
            ours, theirs, in_parts, in_zstd = Timed(), Timed(), Timed(), Timed()
            for _ in range(ROUNDS):
                ours += timed(_heads, run)[1]
                theirs += timed(_default_heads, default, run)[1]
                in_parts += timed(_heads, parts)[1]
                in_zstd += timed(_heads, zstd)[1]
            one_head.append(ours / theirs)
            spilled.append(in_parts / ours)
            zipped.append(in_zstd / ours)
            for layers, ratios in (((LAYER,), one_layer), (run.layers, all_layers)):
                ours, theirs = Timed(), Timed()
                for _ in range(ROUNDS):
                    mine, took = timed(_first_bucket, run, layers)
                    ours += took
                    same, took = timed(_default_bucket, default, run, layers)
                    theirs += took
                    assert len(mine) == len(same)
                ratios.append(ours / theirs)
            _, opened = timed(open_run, many.folder)
            opening.append(1000 * opened.wall)
            _, counted = timed(_counts, many)
            counting.append(1000 * counted.wall)
            _, narrow = timed(_first_bucket, many, (LAYER,))
            _, wide = timed(_first_bucket, many, many.layers)
            of_many.append(narrow / wide)
        rows = len(run.vectors(layer=LAYER, head=4, kind="q").positions)
        files, n_parts = len(many.manifest.parts), len(parts.manifest.parts_of(LAYER, "q"))
    return [
        *both(f"one head of {rows:,} vectors / a default file per head", one_head, limit=0.6),
        *both("one head from zstd / from plain floats", zipped),
        *both(f"one head from {n_parts} parts / from one", spilled),
        *both(f"first {FIRST} positions, q of a layer / default files", one_layer, limit=0.3),
        *both(f"first {FIRST} positions, q of all layers / default files", all_layers),
        *both(f"first {FIRST} positions, q of one layer / of all {files // 2}", of_many),
        figure(f"opening a run of {files} files", opening, unit="ms"),
        figure(f"counting the rows of {files} files by layer, kind and bucket", counting, unit="ms"),
    ]


def _captured(folder: Path, *overrides: str) -> Run:
    whole_run(folder, *overrides)
    run = open_run(folder)
    assert isinstance(run, Run)
    return run


def _counts(run: Run) -> pl.DataFrame:
    return run.scan().group_by("layer", "kind", "bucket").len().collect()


def _first_bucket(run: Run, layers: tuple[int, ...]) -> pl.DataFrame:
    rows = run.scan(layers=layers, kinds=["q"]).filter(pl.col("bucket") == 0)
    return rows.select("head", "position", "vector").collect()


def _default_bucket(folder: Path, run: Run, layers: tuple[int, ...]) -> pl.DataFrame:
    files = [folder / head_file(layer, "q", head) for layer in layers for head in run.heads(layer, "q")]
    rows = pl.scan_parquet(files, include_file_paths="file").filter(pl.col("bucket") == 0)
    return rows.select("file", "position", "vector").collect()


def _heads(run: Run) -> list[np.ndarray]:
    return [run.vectors(layer=LAYER, head=head, kind="q").vectors for head in run.heads(LAYER, "q")]


def _default_heads(folder: Path, run: Run) -> list[np.ndarray]:
    files = [folder / head_file(LAYER, "q", head) for head in run.heads(LAYER, "q")]
    return [pl.read_parquet(file)["vector"].to_numpy() for file in files]


def _as_default(run: Run, folder: Path) -> None:
    """The same queries, one file per head."""
    for layer in run.layers:
        for head in run.heads(layer, "q"):
            one = run.vectors(layer=layer, head=head, kind="q")
            chunk = [torch.from_numpy(one.vectors.copy())]
            columns = Columns((head,), chunk, one.rows, dim=one.vectors.shape[1])
            write_heads(folder, layer, "q", columns)
