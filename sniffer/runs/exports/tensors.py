"""safetensors: all moments of a run in one file, moments.safetensors, for whoever wants arrays alone.

For each layer and kind, as layers.7.k.mean: heads and n (int64), and in float64 mean, minimum, maximum (heads, dim),
norm (heads), pairs (heads, pairs) where RoPE turns them, variance (heads, dim) and covariance (heads, dim, dim) where
they were kept; both over n.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.runs.exports.files import write_tensors
from sniffer.types import Moments


def write(run: Run, place: Path) -> list[str]:
    manifest = run.manifest
    layout = manifest.moments_layout
    if layout is None:
        raise RunError(f"{run.folder} has no moments: capture with capture.moments.kinds=[q,k]")
    tensors: dict[str, np.ndarray] = {}
    for layer in run.layers:
        for kind in layout.kinds:
            heads = run.counted_heads(layer, kind)
            found = [run.moments(layer=layer, head=head, kind=kind) for head in heads]
            named = {"heads": np.array(heads, np.int64), "n": np.array([one.n for one in found], np.int64)}
            tensors |= {f"layers.{layer}.{kind}.{name}": value for name, value in (named | _of(found)).items()}
    told = {"layout": layout.as_json(), "counts": dict(manifest.counts), "status": manifest.status}
    model = {name: manifest.model.get(name) for name in ("checkpoint", "revision", "commit")}
    write_tensors(place / "moments.safetensors", tensors, moments=json.dumps({**told, "model": model}))
    return [f"{len(tensors):,} tensors, of {len(run.layers)} layers and {', '.join(layout.kinds)}"]


def _of(found: list[Moments]) -> dict[str, np.ndarray]:
    wanted: dict[str, list[Any]] = {
        "mean": [one.mean for one in found],
        "minimum": [one.minimum for one in found],
        "maximum": [one.maximum for one in found],
        "norm": [one.norm for one in found],
        "pairs": [one.pairs for one in found],
        "variance": [None if one.squares is None else one.squares / one.n for one in found],
        "covariance": [one.covariance for one in found],
    }
    return {name: np.array(values, np.float64) for name, values in wanted.items() if values[0] is not None}
