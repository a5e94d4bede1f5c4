"""What sums over all positions add: to the forward pass of the embedded model, and to a run's peak memory.

`inside` is the time of summing over the forward it happened in: q and k of every layer and head, with covariances, by
the buckets of log_uniform, and adding up what the text gave. Memory is that of two whole runs over 32,768 tokens of a
small model, one of them without.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.attention import LONG, long_run
from benchmarks.bench import Bench
from benchmarks.measure import Figure, Timed, both, figure, timed
from sniffer.dataset.packages import Pydoc
from sniffer.forward.moments.counting import MomentsPlan, Totals
from sniffer.forward.observer import Observer, Wanted
from sniffer.forward.selection import CaptureConfig, select
from sniffer.forward.transfer import transfer_for
from sniffer.sampler import LogUniform, Picker
from sniffer.tap import Seen
from sniffer.types import MomentsLayout, by_number

LIMITS = {2048: 0.03, 8192: 0.02}
"""Of `inside`, by the tokens of a text."""

KINDS = ("q", "k")
LAYOUT = MomentsLayout(KINDS, "full")


class Summing(Observer):
    """Knows what its sums take."""

    spent: Timed

    def __call__(self, seen: Seen) -> None:
        _, taken = timed(super().__call__, seen)
        self.spent += taken


def measure(repeats: int) -> list[Figure]:
    found: list[Figure] = []
    for tokens, limit in LIMITS.items():
        found += both(
            f"inside / forward, moments of q and k, 1 x {tokens}", inside(Bench(tokens), repeats), cpu_limit=limit
        )
    with TemporaryDirectory() as scratch:
        text = Path(scratch, "long.txt")
        text.write_text("\n".join(str(text) for _, _, text in Pydoc().texts()), encoding="utf-8")
        without, beside = (
            long_run(Path(scratch, name), text, *more)
            for name, more in (("without", ()), ("with", ("capture.moments.kinds=[q,k]",)))
        )
    more = (beside.child.peak - without.child.peak) / 1e6
    return [*found, figure(f"peak memory, MB, moments of q and k above without, {LONG:,} tokens", [more], limit=200)]


@torch.inference_mode()
def inside(bench: Bench, repeats: int) -> list[Timed]:
    """Shares of forwards that sum queries and keys up, and keep no row."""
    backbone, batch, picker = bench.backbone, bench.batch, Picker(LogUniform(base_rate=0.0), seed=0)
    selection = select(backbone.geometry, CaptureConfig(kinds=["q"], layers=[len(backbone.geometry) - 1]))
    heads = {(one.layer, kind): tuple(range(one.heads[kind])) for one in backbone.geometry for kind in KINDS}
    plan = MomentsPlan(LAYOUT, heads, picker, backbone.rope)
    geometry, transfer = by_number(backbone.geometry), transfer_for(backbone.device)
    wanted = Wanted(selection, geometry, backbone.layer_of, transfer, backbone.device, moments=plan)
    totals, shares = Totals(plan), []
    for _ in range(repeats + 1):
        observer = Summing(batch, {}, wanted)
        observer.spent = Timed()
        # No row is drawn, and the forward goes on to its end, to compare like with like.
        wanted.kinds, observer.stops = {}, False
        with observer.open():
            _, whole = timed(bench.forward)
        assert observer.counting is not None
        _, kept = timed(totals.take, observer.counting)
        model = Timed(whole.wall - observer.spent.wall, whole.cpu - observer.spent.cpu)
        observer.spent += kept
        shares.append(observer.spent / model)
    return shares[1:]
