"""What `model.compile=true` gains: the same captures through the embedded model compiled and as it is, two lengths."""

from __future__ import annotations

from collections import defaultdict

import torch
from sniffer.models.backbone import Checkpoint

from benchmarks.bench import EMBEDDED, EVERY, Bench, Capture
from benchmarks.measure import Figure, Timed, both, figure, timed
from sniffer.forward.transfer import Vectors

LENGTHS = (512, 2048)


@torch.inference_mode()
def measure(repeats: int) -> list[Figure]:
    ratios, forwards, differences = defaultdict(list), [], []
    plain = {n: Bench(n) for n in LENGTHS}
    compiled = {n: Bench(n) for n in LENGTHS}
    backbone, loading = timed(Checkpoint(EMBEDDED, compile=True).load)
    for n, bench in compiled.items():
        bench.backbone = backbone
        # One document a batch is compiled for itself, when the first comes.
        _, first = timed(bench.forward)
        loading += first
        differences += _differences(_everything(plain[n]), _everything(bench))
    for _ in range(repeats):
        for n in LENGTHS:
            _, eager = timed(_everything, plain[n])
            _, fast = timed(_everything, compiled[n])
            ratios[n].append(fast / eager)
            forwards.append(eager)
    return [
        *(one for n in LENGTHS for one in both(f"capture compiled / as it is, 1 x {n}", ratios[n])),
        figure(f"loading and compiling / a capture as it is, 1 x {max(LENGTHS)}", _over(loading, forwards)),
        figure("largest difference of a vector / the largest value of its layer and kind", differences),
    ]


def _everything(bench: Bench) -> Vectors:
    capture = Capture(EVERY, bench.batch, bench.backbone)
    bench.capture([capture])
    return capture.observer.vectors


def _differences(plain: Vectors, compiled: Vectors) -> list[float]:
    """One for each layer and kind."""
    return [float((compiled[pair] - rows).abs().max() / rows.abs().max()) for pair, rows in plain.items()]


def _over(loading: Timed, forwards: list[Timed]) -> list[float]:
    """By the longest of the lengths, which comes last in each repeat."""
    return [loading.wall / one.wall for one in forwards[len(LENGTHS) - 1 :: len(LENGTHS)]]
