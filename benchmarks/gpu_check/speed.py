"""Tokens per second, with capture and without, side by side; and a document of 131,072 tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from sniffer.models.loaded import LoadedBackbone
from sniffer.models.outline import working_memory_of

from benchmarks.gpu_check.place import Found, Place, batch_of
from sniffer.dataset.batching import batches
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.observer import draw
from sniffer.forward.passes import Passes
from sniffer.forward.selection import CaptureConfig, select
from sniffer.process.clock import Clock
from sniffer.sampler import All, LogUniform, Picker, Sampler
from sniffer.tap import Seen, StopForward, tap
from sniffer.types import TokenBatch

REPEATS = 3
WAYS: dict[str, Sampler] = {
    "log_uniform": LogUniform(),
    "log_uniform, base_rate 64": LogUniform(base_rate=64.0),
    "all": All(),
}
LONG = 131_072


def shapes(full: bool) -> dict[str, list[TokenBatch]]:
    """Batches of one shape, a long document, and documents of mixed lengths as a run has them."""
    scale, documents = (1, 60) if full else (64, 12)
    lengths = np.random.default_rng(0).lognormal(6.5, 1.0, documents).clip(64, 8192).astype(int) // scale + 1
    mixed = list(batches(batch_of(lengths.tolist()).documents, 8192 // scale, 0))
    return {
        "8 x 1024": [batch_of([1024 // scale] * 8, 8 * n) for n in range(4)],
        "1 x 32768": [batch_of([32768 // scale], n) for n in range(2)],
        "mixed lengths": mixed,
    }


def throughput(place: Place) -> Found:
    """Tokens per second of the bare backbone, and of each way of capturing over that: medians of interleaved repeats.

    A capture ends a forward with the last layer's attention; `ending there` is a bare loop that does so too.
    """
    found: Found = {}
    for width in place.widths:
        backbone = place.model(torch.bfloat16, width)
        for at, these in shapes(place.full).items():
            loops: dict[str, Callable[[], None]] = {
                "bare": partial(_bare, backbone, these),
                "bare, ending there": partial(_ending, backbone, these),
                **{name: partial(captured, backbone, these, sampler) for name, sampler in WAYS.items()},
            }
            seconds = _interleaved(loops, place, REPEATS if place.full else 1)
            tokens = sum(batch.n_tokens for batch in these)
            told: Found = {"tokens/s, bare": tokens / seconds["bare"]}
            told |= {f"{name} / bare": seconds["bare"] / taken for name, taken in seconds.items() if name != "bare"}
            found[f"{width}, {at}"] = told
    return found


def _interleaved(loops: dict[str, Callable[[], None]], place: Place, repeats: int = 1) -> dict[str, float]:
    """Medians of seconds; the first time of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(1 + repeats):
        for name, loop in loops.items():
            place.wait()
            began = time.perf_counter()
            loop()
            place.wait()
            times[name].append(time.perf_counter() - began)
    return {name: sorted(taken[1:])[repeats // 2] for name, taken in times.items()}


@torch.inference_mode()
def _bare(backbone: LoadedBackbone, these: Sequence[TokenBatch]) -> None:
    for batch in these:
        backbone(torch.from_numpy(batch.input_ids()).to(backbone.device))


def _ending(backbone: LoadedBackbone, these: Sequence[TokenBatch]) -> None:
    last = max(backbone.layer_of.values())

    def stop(seen: Seen) -> None:
        if backbone.layer_of.get(seen.module) == last:
            raise StopForward

    with tap(stop):
        _bare(backbone, these)


def captured(backbone: LoadedBackbone, these: Sequence[TokenBatch], sampler: Sampler) -> None:
    """As a worker does it, two batches under way; rows are let go of once they are in memory."""
    selection, picker = select(backbone.geometry, CaptureConfig()), Picker(sampler, 0)
    accumulator = Accumulator(selection)
    passes = Passes(backbone, selection, accumulator, Clock())

    def kept(leave: int) -> Iterator[TokenBatch]:
        yield from passes.settle(leave)
        for pair in accumulator.by_size():
            accumulator.release(*pair)

    for batch in these:
        passes.run(batch, draw(picker, selection, batch))
        list(kept(leave=1))
    list(kept(leave=0))


def long_document(place: Place) -> Found:
    """One document of 131,072 tokens: seconds with and without capture, and memory beside what was predicted."""
    tokens = LONG if place.full else 2048
    backbone, these = place.model(torch.bfloat16, "1B"), [batch_of([tokens])]
    loops: dict[str, Callable[[], None]] = {
        "bare": partial(_bare, backbone, these),
        "log_uniform": partial(captured, backbone, these, LogUniform()),
    }
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
        before = torch.cuda.memory_allocated(place.device)
    seconds = _interleaved(loops, place)
    found: Found = {f"{name}, seconds for {tokens:,} tokens": taken for name, taken in seconds.items()}
    if place.device.type == "cuda":
        found["bytes in a forward"] = torch.cuda.max_memory_allocated(place.device) - before
    config = place.config("1B")
    found["bytes predicted"] = working_memory_of(config, "bfloat16", "sdpa", False, "llama", 1, tokens).peak
    return found
