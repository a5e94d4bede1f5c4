"""How fast the host could go: the whole pipeline with a backbone that costs nothing.

It has the geometry of a model of 8B (32 layers, 32 query and 8 key heads of 128 values, bfloat16), and shows each layer
the same vectors at once. What is left is ours: drawing, gathering, rows in memory, Parquet. A device that computes
more tokens per second than this would wait for the host; written is once, when it has computed all. The vectors are
noise, which compresses worst.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Figure, figure, timed
from sniffer.capture import capture_and_write
from sniffer.dataset.batching import batches
from sniffer.dataset.tokenizing import ReadCounts
from sniffer.engine.base import Plan
from sniffer.engine.crew import Crew
from sniffer.engine.local import LocalPool
from sniffer.engine.worker import Worker
from sniffer.forward.estimate import Estimate
from sniffer.forward.selection import CaptureConfig, Selection, select
from sniffer.process.clock import Clock
from sniffer.process.stop import Stop
from sniffer.sampler import All, LogUniform, Picker, Sampler, Uniform, describe
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.store import Store
from sniffer.tap import TAP
from sniffer.types import Document, LayerGeometry, LengthClasses, Rope, by_number

LAYERS, HEADS, DIM = 32, {"q": 32, "k": 8, "v": 8}, 128
GEOMETRY = tuple(
    LayerGeometry(layer, f"layers.{layer}", HEADS, dict.fromkeys(HEADS, DIM), DIM**-0.5, None)
    for layer in range(LAYERS)
)
TOKENS = 1 << 17
BATCH = 8192
"""Padded tokens, as on a GPU."""

WAYS: dict[str, tuple[Sampler, int, float | None]] = {
    "log_uniform, documents of 1,024": (LogUniform(), 1024, 1e6 / 150_000),
    "log_uniform, documents of 128": (LogUniform(), 128, None),
    "log_uniform, base_rate 64, documents of 1,024": (LogUniform(base_rate=64.0), 1024, None),
    "uniform, documents of 1,024": (Uniform(), 1024, None),
    "all, documents of 1,024": (All(), 1024, None),
}
"""Sampler, tokens of a document, and the microseconds per token that are allowed."""

FEWER = {"all, documents of 1,024": BATCH, "log_uniform, base_rate 64, documents of 1,024": 4 * BATCH}
"""Tokens where many vectors are written: of all, 640 KiB for each token, as float32."""

STAGES = ("sample", "capture", "commit", "write")


class Free:
    """A backbone that shows each layer the same vectors."""

    dtype, device, geometry = torch.bfloat16, torch.device("cpu"), GEOMETRY
    pre_missing, vocabulary, lengths = "", 32_000, LengthClasses()
    rope: Mapping[int, Rope] = MappingProxyType({})

    def __init__(self) -> None:
        self.modules = [torch.nn.Identity() for _ in range(LAYERS)]
        self.layer_of = {module: layer for layer, module in enumerate(self.modules)}
        self.shown: dict[tuple[int, int], list[torch.Tensor]] = {}

    def __call__(self, input_ids: torch.Tensor) -> None:
        batch, seq = input_ids.shape
        if (batch, seq) not in self.shown:
            self.shown[batch, seq] = [
                torch.randn(batch, seq, heads, DIM).bfloat16().transpose(1, 2) for heads in HEADS.values()
            ]
        for module in self.modules:
            TAP.observe(module, *self.shown[batch, seq])

    def describe(self) -> dict[str, Any]:
        return {}

    model_config = describe


@dataclass
class Feed:
    """Documents that are read and tokenised already."""

    documents: list[Document]
    counts: ReadCounts = field(default_factory=ReadCounts)

    def batches(self, tokens: int, lengths: LengthClasses) -> Iterator[Any]:
        return batches(self.documents, tokens, 0, lengths)

    @property
    def expected_documents(self) -> int:
        return len(self.documents)

    @property
    def expected_tokens(self) -> float:
        return float(sum(document.n_tokens for document in self.documents))

    def close(self) -> None: ...


def measure(repeats: int) -> list[Figure]:
    selection, backbone = select(GEOMETRY, CaptureConfig()), Free()
    figures: list[Figure] = []
    for name, (sampler, length, limit) in WAYS.items():
        tokens = FEWER.get(name, TOKENS)
        runs = [run(backbone, selection, Picker(sampler, 0), length, tokens) for _ in range(repeats + 1)][1:]
        busy = [1e6 * clock.seconds["inference"] / tokens for _, clock in runs]
        figures.append(figure(f"{name}: microseconds per token", busy, limit=limit, unit="us"))
        figures.append(figure(f"{name}: tokens/s", [1e6 / one for one in busy]))
        figures.append(figure(f"{name}: tokens/s, writing included", [tokens / seconds for seconds, _ in runs]))
        for stage in STAGES:
            share = [clock.seconds.get(stage, 0.0) / seconds for seconds, clock in runs]
            if max(share) > 0.01:
                figures.append(figure(f"{name}: {stage} / all", share))
    return figures


def run(backbone: Free, selection: Selection, picker: Picker, length: int, tokens: int) -> tuple[float, Clock]:
    """Seconds by the wall of one capture, write included, and by stage."""
    clock = Clock()
    documents = [
        Document(number, str(number), np.zeros(length, np.int32), False) for number in range(1, 1 + tokens // length)
    ]
    plan = Plan(
        by_number(GEOMETRY),
        selection,
        picker,
        Estimate({}, 0, 0, 0, True),
        BATCH,
        "bfloat16",
        "auto",
        LengthClasses(),
        None,
        float("inf"),
    )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / RunFolder.CONFIG).touch()
        checkpoint: Any = SimpleNamespace(check=lambda: None, describe=dict)
        crew = Crew(LocalPool(lambda: Worker(checkpoint, folder, load=lambda _: backbone)), 1, float("inf"))  # type: ignore[arg-type, return-value]
        crew.open()
        store = Store(folder, first_manifest(selection, picker), picker, "bfloat16")
        feed: Any = Feed(documents)
        with Stop() as stop:
            _, spent = timed(capture_and_write, crew, plan, feed, store, clock, stop)
    return spent.wall, clock


def first_manifest(selection: Selection, picker: Picker) -> Manifest:
    return Manifest(
        status="running",
        seed=picker.seed,
        model={},
        dataset={},
        sampler=describe(picker.sampler),
        geometry=GEOMETRY,
        selection=selection.by_layer(),
    )
