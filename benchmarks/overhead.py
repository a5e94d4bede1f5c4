"""What capturing adds to the forward pass: the embedded model, real text, every layer and head.

Each repeat runs the bare forward first, then in random order every other loop over the same batch. `inside` is the
time of drawing, of what the tap calls and of settling, over the forward it happened in; where several samplers watch
one forward, each is timed for itself. `loop` is all of that and the forward over the bare forward of the same repeat.

At the shapes that have limits each sampler has a forward of its own, and one of the loops is the bare one again:
what that varies by is the noise of a ratio of two forwards, and the others are held to it.

On CUDA `inside` is what the processor spends on it; what the GPU spends, `loop` tells.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain

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
LOG_5, LOG_64_5, UNIFORM_5, EVERY_5 = (
    replace(way, name=f"{way.name}, all five kinds", kinds=KINDS) for way in (LOG, LOG_64, UNIFORM, EVERY)
)
FIRST_3 = Way("first 3 of 30 layers", LogUniform(), layers=(0, 1, 2))

SAMPLED, SAMPLED_5 = (LOG, LOG_64, UNIFORM), (LOG_5, LOG_64_5, UNIFORM_5)
ALONE = ((LOG,), (LOG_64,), (UNIFORM,), (EVERY,), SAMPLED_5, (EVERY_5,))
MORE = (SAMPLED, (EVERY,), SAMPLED_5, (EVERY_5,))
AT_ONCE = ((*SAMPLED, EVERY, *SAMPLED_5, EVERY_5),)
"""Where one forward takes half a minute, all watch the same one."""

AGAIN = "the bare loop again"

HELD = [way.name for way in (*SAMPLED, EVERY)]
"""Their loops are held to the noise, where there are limits."""

OF_BARE = {FIRST_3.name: 0.15}
"""Limits of loops that end early."""


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


@dataclass(frozen=True)
class Spent:
    """What one loop over the batch took, and how much of that was inside each of the ways that watched."""

    whole: Timed
    inside: dict[str, Timed] = field(default_factory=dict)


@dataclass(frozen=True)
class Repeats:
    """The bare forward of each repeat, and what the loops of the same repeat took, by name."""

    bare: list[Timed]
    spent: dict[str, list[Spent]]

    def inside(self) -> dict[str, list[Timed]]:
        """Shares of the forward that they are inside of."""
        shares = defaultdict(list)
        for one in chain.from_iterable(self.spent.values()):
            for name, inside in one.inside.items():
                shares[name].append(inside / one.whole)
        return shares

    def loop(self) -> dict[str, list[Timed]]:
        """Over the bare forward of the same repeat."""
        return {
            name: [one.whole / bare for one, bare in zip(these, self.bare, strict=True)]
            for name, these in self.spent.items()
        }


class Bench:
    """The embedded model, a batch of real text, and the ways to run one through the other."""

    def __init__(self, *lengths: int, dtype: str = "float32") -> None:
        self.backbone = loaded(dtype)
        self.batch = real_batch(lengths)
        self.input_ids = torch.from_numpy(self.batch.input_ids()).to(self.backbone.device)

    def forward(self) -> None:
        self.backbone(self.input_ids)
        self.wait()

    def bare(self) -> Spent:
        _, whole = timed(self.forward)
        return Spent(whole)

    def captured(self, captures: deque[Capture]) -> Spent:
        # The first to look finds the memory cold: each in turn.
        captures.rotate()
        _, whole = timed(self.capture, captures)
        return Spent(whole, {one.way.name: one.spent for one in captures})

    def copied(self, name: str) -> Spent:
        """The forward while one of the RIVALS copies."""
        with RIVALS[name](self.backbone) as copies:
            _, whole = timed(self.forward)
        return Spent(whole, {name: copies.spent})

    def capture(self, captures: Iterable[Capture]) -> None:
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
        # The shortest is the noisiest, and costs the least to repeat.
        *compare("1 x 512", Bench(512), ALONE, 3 * repeats, {LOG.name: 0.009, EVERY.name: 0.02}, rivals=True),
        *compare("4 of 128 to 512", Bench(*MIXED), MORE, repeats),
        *compare(
            "1 x 2048",
            Bench(2048),
            (*ALONE, (FIRST_3,)),
            repeats,
            {LOG.name: 0.0025, EVERY.name: 0.01},
            rivals=True,
        ),
        *compare("4 x 2048", Bench(*[2048] * 4), ALONE, repeats, {LOG.name: 0.0015, EVERY.name: 0.01}),
        *compare("1 x 8192", Bench(8192), AT_ONCE, repeats),
        planning(Bench(2048), repeats),
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
) -> list[Figure]:
    """The figures of some ways of capturing, at one shape of batch.

    Args:
        groups: the ways that watch one forward together.
        limits: of `inside`, by the way's name; with them, `loop` is held to the noise.
    """
    loops: dict[str, Callable[[], Spent]] = {AGAIN: bench.bare} if limits else {}
    for group in groups:
        loops[_together(group)] = partial(
            bench.captured, deque(Capture(way, bench.batch, bench.backbone) for way in group)
        )
    loops |= {name: partial(bench.copied, name) for name in RIVALS if rivals}
    bench.forward()
    return _figures(at, repeated(bench, loops, repeats), limits or {})


def _together(group: Sequence[Way]) -> str:
    if len(group) == 1:
        return group[0].name
    kinds = {way.kinds for way in group}
    return f"{len(group)} ways at once" + (", all five kinds" if kinds == {KINDS} else "")


def repeated(bench: Bench, loops: dict[str, Callable[[], Spent]], repeats: int) -> Repeats:
    """The bare forward and, in an order of its own each time, the loops."""
    bare, names, order = [], list(loops), random.Random(0)
    spent: dict[str, list[Spent]] = {name: [] for name in loops}
    for _ in range(repeats):
        bare.append(bench.bare().whole)
        order.shuffle(names)
        for name in names:
            spent[name].append(loops[name]())
    return Repeats(bare, spent)


def _figures(at: str, measured: Repeats, limits: dict[str, float]) -> list[Figure]:
    bare = measured.bare
    middle = Timed(statistics.median(one.wall for one in bare), statistics.median(one.cpu for one in bare))
    found = both(f"a bare forward / their median, {at}", [one / middle for one in bare])
    for name, shares in measured.inside().items():
        if name not in OF_BARE:
            found += both(f"inside / forward, {name}, {at}", shares, limit=limits.get(name))
    loop = measured.loop()
    noise = max(one.wall for one in loop[AGAIN]) if AGAIN in loop else None
    for name, ratios in loop.items():
        limit = OF_BARE.get(name, noise if name in HELD else None)
        found += both(f"loop / bare, {name}, {at}", ratios, limit=limit)
    return found


@torch.inference_mode()
def planning(bench: Bench, repeats: int) -> Figure:
    """Drawing for a long document, over a forward of that length."""
    bench.forward()
    shares = []
    for _ in range(repeats):
        _, drawing = timed(draw_80_layers)
        # A forward at 131,072 tokens takes more than 64 of them at 2,048: attention is quadratic.
        shares.append(drawing.wall / (bench.bare().whole.wall * PLANNED / bench.batch.n_tokens))
    name = f"drawing for {PLANNED:,} positions x 160 (layer, kind) / a forward as long (at least)"
    return figure(name, shares, limit=0.01)


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
    keep_freed_memory(backbone.device)
    return backbone


def real_batch(lengths: Sequence[int]) -> TokenBatch:
    """Documents of exactly these many tokens of documentation."""
    tokenize, pad_id = Checkpoint(EMBEDDED).tokenizer()
    text = "\n".join(text for _, _, text in Pydoc().texts())
    token_ids = np.asarray(tokenize(text)[: sum(lengths)], dtype=np.int32)
    pieces = np.split(token_ids, np.cumsum(lengths)[:-1])
    return TokenBatch(tuple(Document(row, "pydoc", ids, truncated=True) for row, ids in enumerate(pieces)), pad_id)
