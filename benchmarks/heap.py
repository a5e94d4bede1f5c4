"""The same forwards with freed memory kept for the next, and without it, each in its own process."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.measure import ROOT, Figure, Timed, both, figure, timed

FORWARDS = 3


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
    return found


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
