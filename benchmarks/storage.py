"""Writing what one forward at 1 x 2048 gives when every position is captured: 30 layers, 9 q heads, 3 k heads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import torch

from benchmarks.bench import Bench
from benchmarks.default_layout import bytes_in, write_heads
from benchmarks.measure import Figure, both, figure, timed
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.columns import Columns
from sniffer.forward.observer import Observer, Wanted, draw
from sniffer.forward.selection import CaptureConfig, select
from sniffer.forward.transfer import transfer_for
from sniffer.sampler import All, Picker
from sniffer.storage.layout import RunFolder
from sniffer.storage.part_writer import WRITERS
from sniffer.storage.schema import Footer
from sniffer.storage.writer import write_part
from sniffer.tap import tap
from sniffer.types import by_number

SPILLS = 8

Captured = dict[tuple[int, str], Columns]


def measure(repeats: int) -> list[Figure]:
    bench = Bench(2048)
    wide = capture(bench)
    return [*_beside_forward(bench, wide, repeats), *_ways_to_write(wide, repeats)]


@torch.inference_mode()
def _beside_forward(bench: Bench, wide: Captured, repeats: int) -> list[Figure]:
    """As a run writes: into a new folder each time.

    What the repeat before wrote is removed first, and the disk has settled, so that the files lie in memory used
    before. Memory that a virtual machine is given anew adds half as much again to the writing; so the first writing
    is not counted, as the first forward is not.
    """
    of_forward, speed = [], []
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, "run")
        bench.forward()
        write(folder, wide)
        for _ in range(repeats):
            rmtree(folder)
            os.sync()
            _, forward = timed(bench.forward)
            _, mine = timed(write, folder, wide)
            of_forward.append(mine / forward)
            speed.append(_values(wide) * 4 / 1e6 / mine.cpu)
    return [
        *both("writing everything / one forward at 1 x 2048", of_forward, cpu_limit=0.12),
        figure("writing, per core", speed, unit="MB/s"),
    ]


def _ways_to_write(wide: Captured, repeats: int) -> list[Figure]:
    """The same rows as they are written by default, one after the other with all that it is compared with."""
    narrow = {pair: _narrowed(columns) for pair, columns in wide.items()}
    of_default, spilled, zipped = [], [], []
    with TemporaryDirectory() as scratch:
        names = ("ours", "default", "parts", "zstd", "narrow")
        ours, default, parts, zstd, narrowed = (Path(scratch, name) for name in names)
        for repeat in range(repeats):
            _, mine = timed(write, ours, wide)
            _, theirs = timed(_write_default, default, wide)
            of_default.append(mine / theirs)
            spilled.append(timed(_write_in_parts, parts, wide)[1] / mine)
            zipped.append(timed(write, zstd, wide, compression="zstd")[1] / mine)
            if repeat + 1 < repeats:
                for folder in Path(scratch).iterdir():
                    rmtree(folder)
        write(narrowed, narrow, source_dtype="bfloat16")
        sizes = {folder: bytes_in(folder) for folder in (ours, default, parts, zstd, narrowed)}
    return [
        *both("writing everything / one default file per head", of_default),
        figure("bytes / one default file per head", [sizes[ours] / sizes[default]], limit=0.70),
        figure("bytes per float32 value", [sizes[ours] / _values(wide)], unit="bytes"),
        figure(
            "bytes per bfloat16 value, stored as float32", [sizes[narrowed] / _values(wide)], limit=1.5, unit="bytes"
        ),
        *both("writing in zstd / plain, as float32 is by default", zipped),
        figure("bytes in zstd / plain", [sizes[zstd] / sizes[ours]]),
        *both(f"writing {SPILLS} parts / one part per (layer, kind)", spilled),
        figure(f"bytes in {SPILLS} parts / one part per (layer, kind)", [sizes[parts] / sizes[ours]]),
    ]


def _values(captured: Captured) -> int:
    return sum(len(columns) * len(columns.heads) * columns.dim for columns in captured.values())


@torch.inference_mode()
def capture(bench: Bench) -> Captured:
    """Every position of the bench's batch, as a run holds it in memory."""
    backbone = bench.backbone
    selection = select(backbone.geometry, CaptureConfig())
    geometry = by_number(backbone.geometry)
    transfer = transfer_for(backbone.device)
    picks = draw(Picker(All(), seed=0), selection, bench.batch)
    observer = Observer(bench.batch, picks, Wanted(selection, geometry, backbone.layer_of, transfer, backbone.device))
    with tap(observer):
        bench.forward()
    transfer.end_batch()
    accumulator = Accumulator(selection)
    accumulator.add(bench.batch, picks, transfer.settle(observer.vectors))
    return {pair: accumulator.columns(*pair, geometry[pair[0]].dims[pair[1]]) for pair in accumulator.by_size()}


def write(
    folder: Path, captured: Captured, index: int = 0, source_dtype: str = "float32", compression: str = "auto"
) -> None:
    """As a run's store does: several parts at a time."""

    def one(pair: tuple[int, str]) -> None:
        layer, kind = pair
        columns = captured[pair]
        footer = Footer(layer, kind, columns.dim, source_dtype, None, None, {}, 0, ("example", "layer", "kind"))
        write_part(folder, RunFolder.part(layer, kind, index, 30), columns, footer, compression)

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(one, captured))


def _write_in_parts(folder: Path, captured: Captured) -> None:
    for index in range(SPILLS):
        write(folder, {pair: _piece(columns, index) for pair, columns in captured.items()}, index)


def _write_default(folder: Path, captured: Captured) -> None:
    for (layer, kind), columns in captured.items():
        write_heads(folder, layer, kind, columns)


def _piece(columns: Columns, index: int) -> Columns:
    """An eighth of the rows."""
    here = slice(index * len(columns) // SPILLS, (index + 1) * len(columns) // SPILLS)
    [vectors] = columns.vectors
    return replace(columns, vectors=[vectors[here]], rows=columns.rows[here])


def _narrowed(columns: Columns) -> Columns:
    return replace(columns, vectors=[chunk.to(torch.bfloat16) for chunk in columns.vectors])
