"""Peak memory of whole runs: everything captured against nothing captured, same model and text."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Figure, figure, peak_rss

ALLOWANCE = 300e6
"""Bytes above 1.3 x the captured ones that a run may take."""

TEXT = ["dataset=pydoc", "dataset.max_examples=24", "dataset.max_tokens=1024"]


def measure(repeats: int) -> list[Figure]:
    ratios = []
    with TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            nothing, _ = _run(Path(scratch), f"nothing-{repeat}", "sampler=log_uniform", "sampler.base_rate=0")
            everything, captured = _run(Path(scratch), f"everything-{repeat}", "sampler=all")
            ratios.append((everything - nothing) / (1.3 * captured + ALLOWANCE))
    name = "peak RSS over that of a run without captures / (1.3 x captured bytes + 300 MB)"
    return [figure(f"{name}, {captured / 1e6:.0f} MB captured", ratios, limit=1.0)]


def _run(scratch: Path, name: str, *overrides: str) -> tuple[int, int]:
    """The peak resident bytes of a run and the bytes of float32 it captured."""
    folder = scratch / name
    peak = peak_rss(["-m", "sniffer", *TEXT, *overrides, f"hydra.run.dir={folder}"], cwd=scratch)
    manifest = json.loads((folder / "manifest.json").read_text())
    dims = {layer["layer"]: layer["dims"] for layer in manifest["geometry"]}
    return peak, sum(4 * part["rows"] * dims[part["layer"]][part["kind"]] for part in manifest["parts"])
