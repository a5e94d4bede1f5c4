"""What capturing adds to the forward pass: the embedded model, real text, every layer and head.

Each repeat runs the bare forward once and every way of capturing once, in turn, on the same batch. `inside` is
the time of drawing, of what the tap calls and of settling, over the forward it happened in; several samplers may
watch one forward, each timed for itself. `loop` is all of that and the forward over the bare forward of the same
repeat, which has the noise of two forwards: how large that is, the bare ones tell by their spread. At the
shapes that have limits it is held to that.

On CUDA `inside` is what the processor spends on it; what the GPU spends, `loop` tells.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from benchmarks.measure import Figure, Timed, both, figure, timed
from benchmarks.rivals import RIVALS
from models.backbone import Checkpoint
from models.loaded import LoadedBackbone
from sniffer.config import CaptureConfig
from sniffer.dataset import Pydoc
from sniffer.heap import keep_freed_memory
from sniffer.observer import GatherPlan, Observer, draw
from sniffer.sampler import All, LogUniform, Picker, Sampler, Uniform
from sniffer.selection import select
from sniffer.tap import Seen, StopForward, tap
from sniffer.transfer import Vectors, transfer_for
from sniffer.types import KINDS, Document, TokenBatch

EMBEDDED = "embedded:SmolLM2-135M-Instruct"
PLANNED = 131_072
"""Positions of the document that is planned for, over 80 layers."""

MIXED = (512, 384, 256, 128)


@dataclass(frozen=True)
class Way:
    """One way of capturing; where it captures some layers only, the forward ends with the last of them."""

    name: str
    sampler: Sampler
    kinds: tuple[str, ...] = ("q", "k")
    layers: tuple[int, ...] | None = None

    @property
    def wants_pre(self) -> bool:
        return any(kind.endswith("_pre") for kind in self.kinds)


LOG = Way("log_uniform, base_rate 1", LogUniform())
LOG_64 = Way("log_uniform, base_rate 64", LogUniform(base_rate=64))
UNIFORM = Way("uniform, base_rate 1", Uniform())
EVERY = Way("all positions", All())
FIVE_KINDS = Way("all positions, all five kinds", All(), kinds=KINDS)
FIRST_3 = Way("first 3 of 30 layers", LogUniform(), layers=(0, 1, 2))

SAMPLED = (LOG, LOG_64, UNIFORM)
MORE = (SAMPLED, (EVERY,), (FIVE_KINDS,))
AT_ONCE = ((*SAMPLED, EVERY, FIVE_KINDS),)
"""Where one forward takes half a minute, all watch the same one."""

OF_BARE = {FIRST_3.name: 0.15}


class Capture:
    """One way of capturing from one batch, set up as a run does it once for all its batches."""

    def __init__(self, way: Way, batch: TokenBatch, backbone: LoadedBackbone) -> None:
        self.way, self.batch = way, batch
        self.selection = select(backbone.geometry, CaptureConfig(kinds=list(way.kinds), layers=way.layers))
        geometry = {layer.layer: layer for layer in backbone.geometry}
        self.transfer = transfer_for(backbone.device)
        self.plan = GatherPlan(self.selection, geometry, backbone.layer_of, self.transfer, backbone.device)
        self.picker = Picker(way.sampler, seed=0)

    def begin(self) -> None:
        """Draws; from here on `spent` is counted."""
        self.observer, self.spent = timed(self._observer)

    def observe(self, seen: Seen) -> bool:
        """Gathers, and says whether this was all."""
        stopped, spent = timed(self._gather, seen)
        self.spent += spent
        return stopped

    def end(self) -> Vectors:
        vectors, spent = timed(self._settle)
        self.spent += spent
        return vectors

    def _observer(self) -> Observer:
        observer = Observer(self.batch, draw(self.picker, self.selection, self.batch), self.plan)
        # A capture stops at the last wanted layer's attention; to compare like with like, let it run on.
        observer.stops = self.way.layers is not None
        return observer

    def _gather(self, seen: Seen) -> bool:
        try:
            self.observer(seen)
        except StopForward:
            return True
        return False

    def _settle(self) -> Vectors:
        self.transfer.end_batch()
        return self.transfer.settle(self.observer.vectors)


class Bench:
    """The embedded model, a batch of real text, and the ways to run one through the other."""

    def __init__(self, *lengths: int, dtype: str = "float32") -> None:
        self.backbone = loaded(dtype)
        self.batch = real_batch(lengths)
        self.input_ids = torch.from_numpy(self.batch.input_ids()).to(self.backbone.device)

    def forward(self) -> None:
        self.backbone(self.input_ids)
        self.wait()

    def capture(self, captures: Sequence[Capture]) -> None:
        """One forward that all of them watch; it ends when one has all it wants."""

        def observe(seen: Seen) -> None:
            stopped = [one.observe(seen) for one in captures]
            if any(stopped):
                raise StopForward

        for one in captures:
            one.begin()
        with tap(observe, pre=any(one.way.wants_pre for one in captures)):
            self.forward()
        for one in captures:
            one.end()

    def wait(self) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize()


def measure(repeats: int) -> list[Figure]:
    return [
        *compare("1 x 512", Bench(512), MORE, repeats, {LOG.name: 0.009, EVERY.name: 0.02}, rivals=True),
        *compare("4 of 128 to 512", Bench(*MIXED), MORE, repeats),
        *compare(
            "1 x 2048",
            Bench(2048),
            (*MORE, (FIRST_3,)),
            repeats,
            {LOG.name: 0.0025, EVERY.name: 0.01},
            rivals=True,
        ),
        *compare("4 x 2048", Bench(*[2048] * 4), AT_ONCE, repeats, {LOG.name: 0.0015, EVERY.name: 0.01}),
        *compare("1 x 8192", Bench(8192), AT_ONCE, repeats, planning=True),
        *compare("1 x 512, bfloat16", Bench(512, dtype="bfloat16"), MORE, repeats),
        *compare("4 of 128 to 512, bfloat16", Bench(*MIXED, dtype="bfloat16"), MORE, repeats),
        *compare("1 x 2048, bfloat16", Bench(2048, dtype="bfloat16"), MORE, repeats),
        *compare("1 x 8192, bfloat16", Bench(8192, dtype="bfloat16"), AT_ONCE, repeats),
    ]


@torch.inference_mode()
def compare(
    at: str,
    bench: Bench,
    groups: Sequence[Sequence[Way]],
    repeats: int,
    limits: dict[str, float] | None = None,
    *,
    rivals: bool = False,
    planning: bool = False,
) -> list[Figure]:
    """The figures of some ways of capturing, at one shape of batch.

    Args:
        groups: the ways that watch one forward together.
        limits: of `inside`, by the way's name.
    """
    captures = [[Capture(way, bench.batch, bench.backbone) for way in group] for group in groups]
    inside, loop = defaultdict(list), defaultdict(list)
    bare, planned = [], []
    bench.forward()
    for repeat in range(repeats):
        _, forward = timed(bench.forward)
        bare.append(forward)
        for group in captures:
            # The first to look finds the memory cold: each in turn.
            first = repeat % len(group)
            _, whole = timed(bench.capture, [*group[first:], *group[:first]])
            for one in group:
                inside[one.way.name].append(one.spent / whole)
            together = one.way.name if len(group) == 1 else f"{len(group)} ways at once"
            loop[together].append(whole / forward)
        for name, rival in RIVALS.items() if rivals else ():
            with rival(bench.backbone) as copies:
                _, whole = timed(bench.forward)
            inside[name].append(copies.spent / whole)
            loop[name].append(whole / forward)
        if planning:
            _, drawing = timed(draw_80_layers)
            # A forward at 131,072 tokens takes more than sixteen of them at 8,192: attention is quadratic.
            planned.append(drawing.wall / (forward.wall * PLANNED / bench.batch.n_tokens))
    middle = Timed(statistics.median(one.wall for one in bare), statistics.median(one.cpu for one in bare))
    found = both(f"a bare forward / their median, {at}", [one / middle for one in bare])
    noise = found[0].high if limits else None
    for name, shares in inside.items():
        if name not in OF_BARE:
            found += both(f"inside / forward, {name}, {at}", shares, limit=(limits or {}).get(name))
    for name, ratios in loop.items():
        limit = None if name in RIVALS or name == FIVE_KINDS.name else noise
        found += both(f"loop / bare, {name}, {at}", ratios, limit=OF_BARE.get(name, limit))
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


@cache
def loaded(dtype: str) -> LoadedBackbone:
    """As a run has it."""
    backbone = Checkpoint(EMBEDDED, dtype=dtype).load()
    if backbone.device.type == "cpu":
        keep_freed_memory()
    return backbone


def real_batch(lengths: Sequence[int]) -> TokenBatch:
    """Documents of exactly these many tokens of documentation."""
    tokenize, pad_id = Checkpoint(EMBEDDED).tokenizer()
    text = "\n".join(text for _, _, text in Pydoc().texts())
    token_ids = np.asarray(tokenize(text)[: sum(lengths)], dtype=np.int32)
    pieces = np.split(token_ids, np.cumsum(lengths)[:-1])
    return TokenBatch(tuple(Document(row, "pydoc", ids, truncated=True) for row, ids in enumerate(pieces)), pad_id)
