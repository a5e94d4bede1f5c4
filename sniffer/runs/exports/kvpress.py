"""kvpress: the statistics that its ExpectedAttentionStatsPress loads (NVIDIA/kvpress, Devoto et al., 2025).

A folder that huggingface_hub's PyTorchModelHubMixin loads: config.json, and in model.safetensors, in float32,
query_mean (layers, heads, dim) and query_cov (layers, heads, dim, dim), of queries before RoPE, over n - 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.runs.exports.files import write_json, write_tensors
from sniffer.runs.exports.measured import Measured
from sniffer.types import Moments


def write(run: Run, place: Path) -> list[str]:
    measured = Measured(run, "kvpress", ["q_pre"], full=True)
    measured.require_numbered()
    heads, dim = measured.same("heads", "q_pre"), measured.same("dims", "q_pre")
    mean = np.empty((len(measured.layers), heads, dim), np.float32)
    covariance = np.empty((*mean.shape, dim), np.float32)
    n = 0
    for layer in measured.layers:
        for head, moments in enumerate(measured.of(layer.layer, "q_pre")):
            mean[layer.layer, head], covariance[layer.layer, head] = moments.mean, _of_sample(moments)
            n = moments.n
    write_tensors(place / "model.safetensors", {"query_mean": mean, "query_cov": covariance})
    write_json(
        place / "config.json",
        {
            "num_layers": len(measured.layers),
            "num_heads": heads,
            "head_dim": dim,
            "dataset_name": str(run.manifest.dataset.get("path", run.manifest.dataset.get("_target_", ""))),
            "model_name": str(run.manifest.model["checkpoint"]),
            "num_samples": measured.documents,
            "sample_seq_len": int(run.examples()["n_tokens"].max()),  # type: ignore[arg-type]
            "n_sink": 0,
        },
    )
    return [
        f"mean and covariance of {n:,} queries a head before RoPE, of all positions: n_sink is 0 (kvpress's own leave "
        "out the first 4); ExpectedAttentionStatsPress(stats_folder=FOLDER) loads them"
    ]


def _of_sample(moments: Moments) -> np.ndarray:
    """The covariance over n - 1, as kvpress has it."""
    if moments.n < 2:
        raise RunError("kvpress needs two positions at least: a single one has no covariance over n - 1")
    assert moments.products is not None
    return moments.products / (moments.n - 1)
