"""What capturing adds to the forward pass: the embedded model, real text, every layer and head.

Each repeat runs the bare forward twice and every way of capturing once, in turn. `inside` is the time spent in
capture code over that forward; `loop` is drawing, forward and gathering together over the bare forward, which
has the noise of two forwards. How large that is, the two bare ones tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.measure import Figure, figure, timed
from models.backbone import Checkpoint
from sniffer.config import CaptureConfig
from sniffer.dataset import Pydoc
from sniffer.observer import GatherPlan, Observer, draw
from sniffer.sampler import All, LogUniform, Picker, Sampler, Uniform
from sniffer.selection import select
from sniffer.tap import tap
from sniffer.transfer import transfer_for
from sniffer.types import KINDS, Document, TokenBatch

EMBEDDED = "embedded:SmolLM2-135M-Instruct"
PLANNED = 131_072
"""Positions of the document that is planned for, over 80 layers."""


@dataclass(frozen=True)
class Way:
    """One way of capturing, and its limits: share of the forward inside, and over the bare forward in all."""

    name: str
    sampler: Sampler
    kinds: tuple[str, ...] = ("q", "k")
    layers: tuple[int, ...] | None = None
    inside: float | None = None
    of_bare: float | None = None


LOG = "log_uniform, base_rate 1"
EVERY = "all positions"
FIRST_3 = Way("first 3 of 30 layers", LogUniform(), layers=(0, 1, 2), of_bare=0.15)


def ways(inside_log: float | None = None, inside_all: float | None = None) -> list[Way]:
    return [Way(LOG, LogUniform(), inside=inside_log), Way(EVERY, All(), inside=inside_all)]


MORE = [
    Way("log_uniform, base_rate 64", LogUniform(base_rate=64)),
    Way("uniform, base_rate 1", Uniform()),
    Way("all positions, all five kinds", All(), kinds=KINDS),
]


class Bench:
    """The embedded model, a batch of real text, and the ways to run one through the other."""

    def __init__(self, rows: int, n_tokens: int, dtype: str = "float32") -> None:
        checkpoint = Checkpoint(EMBEDDED, dtype=dtype)
        self.backbone = checkpoint.load()
        self.batch = real_batch(checkpoint, rows, n_tokens)
        self.input_ids = torch.from_numpy(self.batch.input_ids()).to(self.backbone.device)

    def forward(self) -> None:
        self.backbone(self.input_ids)
        self.wait()

    def capture(self, way: Way) -> float:
        """Draws, runs and gathers; returns the seconds inside capture code."""
        selection = select(self.backbone.geometry, CaptureConfig(kinds=list(way.kinds), layers=way.layers))
        geometry = {layer.layer: layer for layer in self.backbone.geometry}
        transfer = transfer_for(self.backbone.device)
        plan = GatherPlan(selection, geometry, self.backbone.layer_of, transfer, self.backbone.device)
        observer = Observer(self.batch, draw(Picker(way.sampler, seed=0), selection, self.batch), plan)
        # A capture stops at the last wanted layer's attention; to compare like with like, let it run on.
        observer.stops = way.layers is not None
        with tap(observer, pre=any(kind.endswith("_pre") for kind in way.kinds)):
            self.forward()
        transfer.end_batch()
        transfer.settle(observer.vectors)
        return observer.seconds

    def wait(self) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize()


def measure(repeats: int) -> list[Figure]:
    return [
        *compare("1 x 512", Bench(1, 512), [*ways(0.009, 0.02), *MORE], repeats),
        *compare("1 x 2048", Bench(1, 2048), [*ways(0.0025, 0.01), *MORE, FIRST_3], repeats),
        *compare("4 x 2048", Bench(4, 2048), ways(0.0015, 0.01), repeats),
        *compare("1 x 8192", Bench(1, 8192), ways(), repeats, planning=True),
        *compare("1 x 512, bfloat16", Bench(1, 512, "bfloat16"), ways(), repeats),
    ]


@torch.inference_mode()
def compare(at: str, bench: Bench, these: Sequence[Way], repeats: int, *, planning: bool = False) -> list[Figure]:
    """The figures of some ways of capturing, at one shape of batch."""
    inside, wall, cpu, planned = defaultdict(list), defaultdict(list), defaultdict(list), []
    bench.forward()
    for way in these:
        bench.capture(way)
    for _ in range(repeats):
        _, bare = timed(bench.forward)
        _, again = timed(bench.forward)
        wall["bare"].append(again.wall / bare.wall)
        cpu["bare"].append(again.cpu / bare.cpu)
        for way in these:
            seconds, whole = timed(bench.capture, way)
            inside[way.name].append(seconds / whole.wall)
            wall[way.name].append(whole.wall / min(bare.wall, again.wall))
            cpu[way.name].append(whole.cpu / min(bare.cpu, again.cpu))
        if planning:
            _, drawing = timed(draw_80_layers)
            # A forward at 131,072 tokens takes more than sixteen of them at 8,192: attention is quadratic.
            planned.append(drawing.wall / (bare.wall * PLANNED / bench.batch.n_tokens))
    found = [figure(f"bare forward / bare forward, {at}", wall["bare"])]
    for way in these:
        if way.of_bare is None:
            found.append(figure(f"inside / forward, {way.name}, {at}", inside[way.name], limit=way.inside))
        found.append(figure(f"loop / bare, {way.name}, {at}", wall[way.name], limit=way.of_bare))
        found.append(figure(f"loop / bare, processor time, {way.name}, {at}", cpu[way.name]))
    if planned:
        name = f"drawing for {PLANNED:,} positions x 160 (layer, kind) / a forward as long (at least)"
        found.append(figure(name, planned, limit=0.01))
    return found


def draw_80_layers() -> None:
    """All picks of one document for 80 layers, q and k."""
    batch = TokenBatch((Document(0, "long", np.zeros(PLANNED, np.int32), truncated=False),), 0)
    picker = Picker(LogUniform(), seed=0)
    for layer in range(80):
        for side in ("q", "k"):
            picker.pick(batch, layer, side)


def real_batch(checkpoint: Checkpoint, rows: int, n_tokens: int) -> TokenBatch:
    """Documents of exactly `n_tokens` tokens of documentation each."""
    tokenize, pad_id = checkpoint.tokenizer()
    text = "\n".join(text for _, _, text in Pydoc().texts())
    token_ids = np.asarray(tokenize(text)[: rows * n_tokens], dtype=np.int32).reshape(rows, n_tokens)
    return TokenBatch(tuple(Document(row, "pydoc", ids, truncated=True) for row, ids in enumerate(token_ids)), pad_id)
