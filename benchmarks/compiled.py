"""Whether torch.compile would pay: the embedded model's layers compiled, one graph for all, at two lengths."""

from __future__ import annotations

import time

import torch

from benchmarks.measure import Figure, figure, timed
from benchmarks.overhead import Bench

LENGTHS = (512, 2048)


@torch.inference_mode()
def measure(repeats: int) -> list[Figure]:
    plain, compiled = Bench(1, max(LENGTHS)), Bench(1, max(LENGTHS))
    for layer in compiled.backbone.module.layers:
        layer.compile(dynamic=True)
    ids = {n: plain.input_ids[:, :n].contiguous() for n in LENGTHS}
    started = time.perf_counter()
    differences = [(compiled.backbone(one) - plain.backbone(one)).abs().max().item() for one in ids.values()]  # type: ignore[operator]
    compiling = time.perf_counter() - started
    ratios: dict[int, list[float]] = {n: [] for n in LENGTHS}
    forward = []
    for _ in range(repeats):
        for n, one in ids.items():
            _, eager = timed(plain.backbone, one)
            _, fast = timed(compiled.backbone, one)
            ratios[n].append(fast.wall / eager.wall)
        forward.append(eager.wall)
    return [
        *(figure(f"compiled / eager forward, 1 x {n}", ratios[n]) for n in LENGTHS),
        figure(f"compiling / one eager forward, 1 x {max(LENGTHS)}", [compiling / one for one in forward]),
        figure("largest difference in the last hidden states", differences),
    ]
