"""The same forwards with freed memory kept for the next, and without it, each in its own process.

And whole runs that keep few rows, over documents of mixed lengths, whose blocks are of nearly all different sizes: what
is kept must fit again, or the peak grows.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.measure import ROOT, Figure, Timed, both, figure, timed, whole_run

FORWARDS = 3
DOCUMENTS, MOST_TOKENS = 40, 2048
PEAK_LIMIT = 1.15
GIVEN_BACK = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
"""Changes nothing, but that the environment says how malloc is to do: then a run leaves it alone."""


def measure(repeats: int) -> list[Figure]:
    if sys.platform != "linux":
        return []
    found = []
    for length in (512, 2048):
        spent, peaks, faults = [], [], []
        for _ in range(repeats):
            kept, left = _child("keep", length), _child("leave", length)
            if not kept:
                print("heap: freed memory cannot be kept here, nothing measured")
                return []
            spent.append(Timed(kept["wall"], kept["cpu"]) / Timed(left["wall"], left["cpu"]))
            peaks.append(kept["peak"] / left["peak"])
            faults.append(left["faults"])
        found += both(f"freed memory kept / given back, a forward at 1 x {length}", spent)
        found.append(figure(f"peak memory, freed memory kept / given back, 1 x {length}", peaks))
        found.append(figure(f"a forward with memory given back, 1 x {length}", faults, unit="page faults"))
    return [*found, *_sparse(-(-repeats // 3))]


def _sparse(repeats: int) -> list[Figure]:
    spent, peaks, highest = [], [], []
    with TemporaryDirectory() as scratch:
        texts = Path(scratch, "ids.jsonl")
        chance = np.random.default_rng(0)
        lengths = chance.lognormal(6.3, 0.8, DOCUMENTS).clip(50, MOST_TOKENS).astype(int)
        rows = (json.dumps({"ids": chance.integers(5, 40_000, n).tolist()}) for n in lengths)
        texts.write_text("\n".join(rows) + "\n", encoding="utf-8")
        typed = ("dataset=jsonl", f"dataset.path={texts}", "dataset.tokens_column=ids", "sampler=log_uniform")
        for repeat in range(repeats):
            kept = whole_run(Path(scratch, f"kept-{repeat}"), *typed)
            left = whole_run(Path(scratch, f"left-{repeat}"), *typed, environment=GIVEN_BACK)
            spent.append(kept.child.spent / left.child.spent)
            peaks.append(kept.child.peak / left.child.peak)
            highest.append(kept.child.peak / 1e9)
    name = "freed memory kept / given back, a sparse run over mixed lengths"
    return [
        *both(name, spent),
        figure(f"peak memory, {name}", peaks, limit=PEAK_LIMIT),
        figure("peak memory, a sparse run over mixed lengths", highest, unit="GB"),
    ]


def _child(how: str, length: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.heap", how, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return dict(json.loads(done.stdout))


@torch.inference_mode()
def main(how: str, length: str) -> None:
    from sniffer.models.backbone import Checkpoint

    from benchmarks.bench import EMBEDDED, real_batch
    from sniffer.process.memory import keep_freed_memory

    input_ids = torch.from_numpy(real_batch([int(length)]).input_ids())
    backbone = Checkpoint(EMBEDDED).load()
    if how == "keep" and not keep_freed_memory(backbone.device):
        print("{}")
        return
    backbone(input_ids)
    # From here on the peak is that of the forwards, not of loading.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _, spent = timed(lambda: [backbone(input_ids) for _ in range(FORWARDS)])
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / FORWARDS
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    print(json.dumps({"wall": spent.wall, "cpu": spent.cpu, "peak": int(peak), "faults": faults}))


if __name__ == "__main__":
    main(*sys.argv[1:])
