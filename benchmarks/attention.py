"""What exact statistics of attention add: to the forward pass of the embedded model, and to a run's peak memory.

`inside` is the time of computing them over the forward it happened in: every layer and head, log_uniform, base_rate 1.
The proof on a text longer than any before is left out: it happens a few times in a run. Memory is that of two whole
runs over 32,768 tokens of a small model, one of them without.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.bench import Bench
from benchmarks.long_context import MORE, SHAPE
from benchmarks.measure import Figure, Timed, WholeRun, both, figure, timed, whole_run
from sniffer.dataset.packages import Pydoc
from sniffer.forward.attention.attending import AttentionPlan
from sniffer.forward.attention.prove import prove
from sniffer.forward.observer import Observer, Wanted, draw
from sniffer.forward.selection import CaptureConfig, select
from sniffer.forward.transfer import transfer_for
from sniffer.sampler import LogUniform, Picker
from sniffer.tap import Attended
from sniffer.types import ALL_STATISTICS, AttentionLayout

LONG = 32_768
LIMITS = {2048: 0.015, 8192: 0.01}
"""Of `inside`, by the tokens of a text."""


class Counting(Observer):
    """Knows what its statistics take."""

    spent = Timed(0.0, 0.0)

    def called(self, shown: Attended) -> None:
        _, taken = timed(super().called, shown)
        self.spent = Timed(self.spent.wall + taken.wall, self.spent.cpu + taken.cpu)


def measure(repeats: int) -> list[Figure]:
    found: list[Figure] = []
    for tokens, limit in LIMITS.items():
        shares = inside(Bench(tokens), repeats)
        found += both(f"inside / forward, capture.attention=all, 1 x {tokens}", shares, cpu_limit=limit)
    with TemporaryDirectory() as scratch:
        text = Path(scratch, "long.txt")
        text.write_text("\n".join(str(text) for _, _, text in Pydoc().texts()), encoding="utf-8")
        without, beside = (
            long_run(Path(scratch, name), text, *more)
            for name, more in (("without", ()), ("with", ("capture.attention=all",)))
        )
    more = (beside.child.peak - without.child.peak) / 1e6
    return [*found, figure(f"peak memory, MB, capture.attention=all above without, {LONG:,} tokens", [more], limit=200)]


@torch.inference_mode()
def inside(bench: Bench, repeats: int) -> list[Timed]:
    """Shares of forwards that watch nothing but queries and their attention."""
    backbone, batch, picker = bench.backbone, bench.batch, Picker(LogUniform(), seed=0)
    tokens = batch.seq_len
    buckets = picker.buckets_until(tokens)
    layout = AttentionLayout(ALL_STATISTICS, 1 + int(buckets.max()), tokens.bit_length(), 8)
    selection = select(backbone.geometry, CaptureConfig(attention="all"))
    geometry = {layer.layer: layout.of_layer(layer) for layer in backbone.geometry}
    plan = AttentionPlan(layout, prove(backbone, selection.layers), buckets, proven=tokens)
    wanted = Wanted(
        selection, geometry, backbone.layer_of, transfer_for(backbone.device), backbone.device, attention=plan
    )
    shares = []
    for _ in range(repeats + 1):
        observer = Counting(batch, draw(picker, selection, batch), wanted)
        # A capture stops at the last wanted layer's attention; to compare like with like, let it run on.
        observer.stops = False
        with observer.open():
            _, whole = timed(bench.forward)
        shares.append(observer.spent / Timed(whole.wall - observer.spent.wall, whole.cpu - observer.spent.cpu))
    return shares[1:]


def long_run(folder: Path, text: Path, *more: str) -> WholeRun:
    """Over a text of LONG tokens, by a small model."""
    return whole_run(
        folder,
        "model=llama3",
        "model.weights=random",
        f"model.config_overrides={{num_hidden_layers: 2, {SHAPE}, {MORE}}}",
        "dataset=text",
        f"dataset.path={text}",
        f"dataset.max_tokens={LONG}",
        *more,
    )
