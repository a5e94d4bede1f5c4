"""What capturing adds to the forward pass: the embedded model, one document of real text."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from benchmarks.measure import Figure, figure, timed
from models.backbone import Checkpoint
from sniffer.config import CaptureConfig
from sniffer.dataset import Pydoc
from sniffer.observer import GatherPlan, Observer, draw
from sniffer.sampler import All, LogUniform, Picker, Sampler
from sniffer.selection import select
from sniffer.tap import tap
from sniffer.transfer import HostTransfer
from sniffer.types import Document, TokenBatch

SAMPLERS: dict[str, Sampler] = {"log_uniform, base_rate 1": LogUniform(), "all positions": All()}
LIMITS = {"log_uniform, base_rate 1": 0.01, "all positions": 0.05}
"""Time inside the capture code over the forward pass, at 1 x 2048 tokens, q and k of every layer."""


class Bench:
    """The embedded model, a batch of real text, and the ways to run one through the other."""

    def __init__(self, n_tokens: int) -> None:
        checkpoint = Checkpoint("embedded:SmolLM2-135M-Instruct")
        self.backbone = checkpoint.load()
        self.batch = real_batch(checkpoint, n_tokens)
        self.selection = select(self.backbone.geometry, CaptureConfig())
        geometry = {layer.layer: layer for layer in self.backbone.geometry}
        layer_of, device = self.backbone.layer_of, self.backbone.device
        self.plan = GatherPlan(self.selection, geometry, layer_of, HostTransfer(), device)
        self.input_ids = torch.from_numpy(self.batch.input_ids())

    def forward(self) -> None:
        self.backbone(self.input_ids)

    def sample(self, picker: Picker) -> Observer:
        observer = Observer(self.batch, draw(picker, self.selection, self.batch), self.plan)
        # A capture stops at the last layer's attention; to compare like with like, let it run on.
        observer.stops = False
        return observer

    def capture(self, observer: Observer) -> None:
        with tap(observer):
            self.forward()


def measure(repeats: int, n_tokens: int = 2048) -> list[Figure]:
    bench = Bench(n_tokens)
    inside, sampling, loops = defaultdict(list), defaultdict(list), defaultdict(list)
    pickers = {name: Picker(sampler, seed=0) for name, sampler in SAMPLERS.items()}
    with torch.inference_mode():
        bench.forward()
        for picker in pickers.values():
            bench.sample(picker)
        for _ in range(repeats):
            _, bare = timed(bench.forward)
            for name, picker in pickers.items():
                observer, sampled = timed(bench.sample, picker)
                _, whole = timed(bench.capture, observer)
                sampling[name].append(sampled.wall / whole.wall)
                inside[name].append(observer.seconds / whole.wall)
                loops[name].append((sampled.cpu + whole.cpu) / bare.cpu)
    at = f"1 x {n_tokens}"
    return [
        *(figure(f"inside capture / forward, {n}, {at}", inside[n], limit=LIMITS[n]) for n in SAMPLERS),
        *(figure(f"sampling / forward, {n}, {at}", sampling[n], limit=0.01) for n in SAMPLERS),
        *(figure(f"captured loop / bare loop, processor time, {n}, {at}", loops[n]) for n in SAMPLERS),
    ]


def real_batch(checkpoint: Checkpoint, n_tokens: int) -> TokenBatch:
    """One document of exactly `n_tokens` tokens of documentation."""
    tokenize, pad_id = checkpoint.tokenizer()
    text = "\n".join(text for _, _, text in Pydoc().texts())
    token_ids = np.asarray(tokenize(text)[:n_tokens], dtype=np.int32)
    return TokenBatch((Document(0, "pydoc", token_ids, truncated=True),), pad_id)
