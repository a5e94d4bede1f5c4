"""qfilters: a direction for each key head, along which queries lie (Godey et al., 2025, arXiv 2503.02812).

A folder that huggingface_hub's PyTorchModelHubMixin loads: config.json, and in model.safetensors, in float32, q_filters
(layers, key heads, dim). For each query head v is the first right singular vector of its queries after RoPE, not
centred, turned so that their mean lies along it: <k, v> then ranks keys by how much these queries attend to them. Those
who load filters (NathanGodey/qfilters, kvpress's QFilterPress) keep keys by *minus* their product with the filter, so
that the filter is -v, its mean over the query heads of a key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from sniffer.reader.run import Run
from sniffer.runs.exports.files import write_json, write_tensors
from sniffer.runs.exports.measured import Measured
from sniffer.types import Moments


def write(run: Run, place: Path) -> list[str]:
    measured = Measured(run, "qfilters", ["q"], full=True)
    measured.require_numbered()
    heads, dim = measured.same("heads", "k"), measured.same("dims", "q")
    filters = np.zeros((len(measured.layers), heads, dim))
    for layer in measured.layers:
        groups: dict[int, list[Moments]] = {}
        for head, moments in enumerate(measured.of(layer.layer, "q")):
            groups.setdefault(layer.key_head(head), []).append(moments)
        for head, group in groups.items():
            filters[layer.layer, head] = filter_of(group)
    write_tensors(place / "model.safetensors", {"q_filters": filters.astype(np.float32)})
    write_json(place / "config.json", {"num_layers": len(filters), "num_kv_heads": heads, "kv_head_dim": dim})
    return ["filters of queries after RoPE, at all positions: keys with a small product with theirs are kept"]


def filter_of(queries: Sequence[Moments]) -> Float64[np.ndarray, " dim"]:
    """Of a key head, from those of its query heads."""
    return -np.mean([_direction(moments) for moments in queries], axis=0)


def _direction(moments: Moments) -> np.ndarray:
    """The unit vector along which vectors are longest about zero, turned to where their mean points."""
    assert moments.second is not None
    vector = np.linalg.eigh(moments.second)[1][:, -1]
    return vector if vector @ moments.mean >= 0 else -vector
