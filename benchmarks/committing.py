"""What commits cost while a run goes on: the demo's model and text, shorter documents, more of them.

Shares are of all the seconds of the same run. The last write, which a run without commits has too, is counted in, so
that they say more than commits alone cost; and on longer documents they are smaller.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Figure, WholeRun, figure, whole_run

DEMO = ("experiment=demo", "dataset.max_examples=40", "dataset.max_tokens=512")
EVERY = {10: 0.05, 1: None}
"""Documents between commits, and the share allowed."""


def measure(repeats: int) -> list[Figure]:
    shares: dict[int, list[float]] = {every: [] for every in EVERY}
    with TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            for every in EVERY:
                run = whole_run(Path(scratch, f"{every}-{repeat}"), *DEMO, f"output.checkpoint_every={every}")
                shares[every].append(share(run))
    return [
        figure(f"commits and the last write / the whole run, checkpoint_every={every}", shares[every], limit=limit)
        for every, limit in EVERY.items()
    ]


def share(run: WholeRun) -> float:
    seconds = run.seconds
    return (seconds["commit"] + seconds["write"]) / sum(
        seconds[stage] for stage in ("load", "commit", "inference", "write")
    )
