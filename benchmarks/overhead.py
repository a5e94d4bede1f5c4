"""What capturing adds to the forward pass: the embedded model, real text, every layer and head.

Each repeat runs the bare forward first, then in random order every other loop over the same batch. `inside` is the
time of drawing, of what the tap calls and of settling, over the forward it happened in; where several samplers watch
one forward, each is timed for itself. `loop` is all of that and the forward over the bare forward of the same repeat.

At the shapes that have limits each sampler has a forward of its own, and one of the loops is the bare one again:
what that varies by is the noise of a ratio of two forwards, and the others are held to it.

On CUDA `inside` is what the processor spends on it; what the GPU spends, `loop` tells.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.bench import (
    EVERY,
    EVERY_5,
    FIRST_3,
    LOG,
    LOG_5,
    LOG_64,
    LOG_64_5,
    UNIFORM,
    UNIFORM_5,
    Bench,
    Capture,
    Way,
)
from benchmarks.measure import Figure, Timed, both, figure, timed
from benchmarks.repeats import AGAIN, Repeats, Spent, once, repeated
from benchmarks.rivals import RIVALS
from sniffer.sampler import LogUniform, Picker
from sniffer.types import KINDS, Document, TokenBatch

PLANNED = 131_072
"""Positions of the document that is planned for, over 80 layers."""

MIXED = (512, 384, 256, 128)


SAMPLED, SAMPLED_5 = (LOG, LOG_64, UNIFORM), (LOG_5, LOG_64_5, UNIFORM_5)
ALONE = ((LOG,), (LOG_64,), (UNIFORM,), (EVERY,), SAMPLED_5, (EVERY_5,))
MORE = (SAMPLED, (EVERY,), SAMPLED_5, (EVERY_5,))
AT_ONCE = ((*SAMPLED, EVERY, *SAMPLED_5, EVERY_5),)
"""Where one forward takes half a minute, all watch the same one."""

HELD = [way.name for way in (*SAMPLED, EVERY)]
"""Their loops are held to the noise, where there are limits."""

OF_BARE = {FIRST_3.name: 0.15}
"""Limits of loops that end early."""


def captured(bench: Bench, captures: deque[Capture]) -> Spent:
    # The first to look finds the memory cold: each in turn.
    captures.rotate()
    _, taken = timed(bench.capture, captures)
    return Spent(taken, {one.way.name: one.spent for one in captures})


def copied(bench: Bench, name: str) -> Spent:
    """The forward while one of the RIVALS copies."""
    with RIVALS[name](bench.backbone) as copies:
        _, taken = timed(bench.forward)
    return Spent(taken, {name: copies.spent})


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
    bare = partial(once, bench.forward)
    loops: dict[str, Callable[[], Spent]] = {AGAIN: bare} if limits else {}
    for group in groups:
        captures = deque(Capture(way, bench.batch, bench.backbone) for way in group)
        loops[_together(group)] = partial(captured, bench, captures)
    loops |= {name: partial(copied, bench, name) for name in RIVALS if rivals}
    bench.forward()
    return _figures(at, repeated(bare, loops, repeats), limits or {})


def _together(group: Sequence[Way]) -> str:
    if len(group) == 1:
        return group[0].name
    kinds = {way.kinds for way in group}
    return f"{len(group)} ways at once" + (", all five kinds" if kinds == {KINDS} else "")


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
        shares.append(drawing.wall / (once(bench.forward).whole.wall * PLANNED / bench.batch.n_tokens))
    name = f"drawing for {PLANNED:,} positions x 160 (layer, kind) / a forward as long (at least)"
    return figure(name, shares, limit=0.01)


def draw_80_layers() -> None:
    """All picks of one document for 80 layers, q and k."""
    batch = TokenBatch((Document(0, "long", np.zeros(PLANNED, np.int32), truncated=False),), 0)
    picker = Picker(LogUniform(), seed=0)
    for layer in range(80):
        for side in ("q", "k"):
            picker.pick(batch, layer, side)
