"""A GPU kept busy: a loop over batches that captures, two batches under way as in a run, over the bare loop.

The processor only launches, so what counts is the time until all rows are on the host. On a machine without CUDA
nothing is measured; `make bench` runs the suite wherever it is.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.bench import EVERY, EVERY_5, LOG, LOG_64, Bench, Capture, Way
from benchmarks.measure import Figure, both
from benchmarks.repeats import AGAIN, once, repeated
from sniffer.forward.observer import Observer
from sniffer.tap import tap

BATCHES = 16
SHAPES = {"8 x 2048": (2048,) * 8, "1 x 8192": (8192,)}
WAYS = (LOG, LOG_64, EVERY, EVERY_5)


def measure(repeats: int) -> list[Figure]:
    if not torch.cuda.is_available():
        print("gpu: no CUDA device on this machine, nothing measured")
        return []
    return [one for at, lengths in SHAPES.items() for one in compare(at, Bench(*lengths, dtype="bfloat16"), repeats)]


@torch.inference_mode()
def compare(at: str, bench: Bench, repeats: int) -> list[Figure]:
    bare = partial(once, partial(bare_loop, bench))
    loops = {AGAIN: bare} | {way.name: partial(once, partial(capturing_loop, bench, way)) for way in WAYS}
    for loop in loops.values():
        loop()
    return [
        one
        for name, ratios in repeated(bare, loops, repeats).loop().items()
        for one in both(f"{BATCHES} batches / bare ones, {name}, {at}", ratios)
    ]


def bare_loop(bench: Bench) -> None:
    for _ in range(BATCHES):
        bench.backbone(bench.input_ids)
    bench.wait()


def capturing_loop(bench: Bench, way: Way) -> None:
    capture = Capture(way, bench.batch, bench.backbone)
    in_flight: list[Observer] = []
    for _ in range(BATCHES):
        capture.begin()
        with tap(capture.observer, pre=way.wants_pre):
            bench.backbone(bench.input_ids)
        capture.transfer.end_batch()
        in_flight.append(capture.observer)
        if len(in_flight) > 1:
            capture.transfer.settle(in_flight.pop(0).vectors)
    capture.transfer.settle(in_flight.pop().vectors)
    bench.wait()
