"""Peak memory of whole runs: everything captured, above what the model needs with nothing captured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Figure, figure, resident

ALLOWANCE = 300e6
"""Bytes above 1.3 x the captured ones that a run may take."""

TEXT = ["dataset=pydoc", "dataset.max_examples=24", "dataset.max_tokens=1024"]


def measure(repeats: int) -> list[Figure]:
    ratios = []
    with TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            nothing, _ = _run(Path(scratch, f"nothing-{repeat}"), "sampler=log_uniform", "sampler.base_rate=0")
            everything, captured = _run(Path(scratch, f"everything-{repeat}"), "sampler=all")
            # The model's own memory is that of its steady state, not of the moment at which weights are read.
            own = statistics.median(nothing[len(nothing) // 2 :])
            ratios.append((max(everything) - own) / (1.3 * captured + ALLOWANCE))
    name = "peak RSS above the model's own / (1.3 x captured bytes + 300 MB)"
    return [figure(f"{name}, {captured / 1e6:.0f} MB captured", ratios, limit=1.0)]


def _run(folder: Path, *overrides: str) -> tuple[list[int], int]:
    """The resident bytes of a run over time, and the bytes of float32 it captured."""
    samples = resident(["-m", "sniffer", *TEXT, *overrides, f"hydra.run.dir={folder}"])
    manifest = json.loads((folder / "manifest.json").read_text())
    dims = {layer["layer"]: layer["dims"] for layer in manifest["geometry"]}
    return samples, sum(4 * part["rows"] * dims[part["layer"]][part["kind"]] for part in manifest["parts"])
