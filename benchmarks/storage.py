"""Writing what one forward at 1 x 2048 gives when every position is captured: 30 layers, 9 q heads, 3 k heads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import torch

from benchmarks.default_layout import bytes_in, write_heads
from benchmarks.measure import Figure, both, figure, timed
from benchmarks.overhead import Bench
from sniffer.accumulator import Accumulator
from sniffer.config import CaptureConfig
from sniffer.observer import GatherPlan, Observer, draw
from sniffer.parts import WRITERS
from sniffer.sampler import All, Picker
from sniffer.schema import Columns, Footer, part_path
from sniffer.selection import select
from sniffer.tap import tap
from sniffer.transfer import transfer_for
from sniffer.writer import write_part

SPILLS = 8

Captured = dict[tuple[int, str], Columns]


def measure(repeats: int) -> list[Figure]:
    bench = Bench(2048)
    wide = capture(bench)
    narrow = {pair: _narrowed(columns) for pair, columns in wide.items()}
    values = sum(len(c) * len(c.heads) * c.dim for c in wide.values())
    of_forward, of_default, speed, size, narrow_size, spilled, spilled_size, zipped, zipped_size = (
        [] for _ in range(9)
    )
    with TemporaryDirectory() as scratch, torch.inference_mode():
        bench.forward()
        for _ in range(repeats):
            ours, default, parts = Path(scratch, "ours"), Path(scratch, "default"), Path(scratch, "parts")
            _, forward = timed(bench.forward)
            _, mine = timed(write, ours, wide)
            _, theirs = timed(_write_default, default, wide)
            _, spill = timed(_write_in_parts, parts, wide)
            of_forward.append(mine / forward)
            of_default.append(mine / theirs)
            speed.append(values * 4 / 1e6 / mine.cpu)
            size.append(bytes_in(ours) / bytes_in(default))
            spilled.append(spill / mine)
            spilled_size.append(bytes_in(parts) / bytes_in(ours))
            _, zstd = timed(write, Path(scratch, "zstd"), wide, compression="zstd")
            zipped.append(zstd / mine)
            zipped_size.append(bytes_in(Path(scratch, "zstd")) / bytes_in(ours))
            write(Path(scratch, "narrow"), narrow, source_dtype="bfloat16")
            narrow_size.append(bytes_in(Path(scratch, "narrow")) / values)
            for folder in Path(scratch).iterdir():
                rmtree(folder)
    return [
        *both("writing everything / one forward at 1 x 2048", of_forward, cpu_limit=0.12),
        *both("writing everything / one default file per head", of_default),
        figure("writing, per core", speed, unit="MB/s"),
        figure("bytes / one default file per head", size, limit=0.70),
        figure("bytes per bfloat16 value, stored as float32", narrow_size, limit=1.5, unit="bytes"),
        *both("writing in zstd / plain, as float32 is by default", zipped),
        figure("bytes in zstd / plain", zipped_size),
        *both(f"writing {SPILLS} parts / one part per (layer, kind)", spilled),
        figure(f"bytes in {SPILLS} parts / one part per (layer, kind)", spilled_size),
    ]


@torch.inference_mode()
def capture(bench: Bench) -> Captured:
    """Every position of the bench's batch, as a run holds it in memory."""
    backbone = bench.backbone
    selection = select(backbone.geometry, CaptureConfig())
    geometry = {layer.layer: layer for layer in backbone.geometry}
    transfer = transfer_for(backbone.device)
    picks = draw(Picker(All(), seed=0), selection, bench.batch)
    observer = Observer(
        bench.batch, picks, GatherPlan(selection, geometry, backbone.layer_of, transfer, backbone.device)
    )
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
        write_part(folder, part_path(layer, kind, index, 30), columns, footer, compression)

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
    return replace(
        columns,
        vectors=[vectors[here]],
        buckets=columns.buckets[here],
        positions=columns.positions[here],
        token_ids=columns.token_ids[here],
        example_ids=columns.example_ids[here],
    )


def _narrowed(columns: Columns) -> Columns:
    return replace(columns, vectors=[chunk.to(torch.bfloat16) for chunk in columns.vectors])
