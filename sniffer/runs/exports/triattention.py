"""triattention: frequency centres of queries (WeianMao/triattention, as its scripts/calibrate.py saves them).

stats.pt, by torch.save: `stats` has for each query head, as layer07_head03, three float32 tensors over pairs of
dimensions that RoPE turns: q_mean_real and q_mean_imag, the mean of the pair read as a complex number before RoPE, and
q_abs_mean, its mean length. `metadata` says of which model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.runs.exports.measured import Measured
from sniffer.types import LayerGeometry, Rope


def write(run: Run, place: Path) -> list[str]:
    import torch

    measured = Measured(run, "triattention", ["q_pre"], full=False)
    measured.require_numbered()
    rope, stats = _rope(measured), {}
    real, imaginary = rope.places(pre=True)
    for layer in measured.layers:
        for head, moments in enumerate(measured.of(layer.layer, "q_pre")):
            assert moments.pairs is not None
            values = {
                "q_mean_real": moments.mean[real],
                "q_mean_imag": moments.mean[imaginary],
                "q_abs_mean": moments.pairs,
            }
            stats[f"layer{layer.layer:02d}_head{head:02d}"] = {
                name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()
            }
    torch.save({"metadata": _metadata(measured, rope), "stats": stats}, place / "stats.pt")
    return [f"frequency centres of {len(stats)} query heads, of all positions before RoPE, in stats.pt"]


def _metadata(measured: Measured, rope: Rope) -> dict[str, Any]:
    manifest = measured.run.manifest
    return {
        "num_traces": measured.documents,
        "num_layers": len(measured.layers),
        "num_attention_heads": measured.same("heads", "q_pre"),
        "num_kv_heads": measured.same("heads", "k"),
        "head_dim": measured.same("dims", "q_pre"),
        "model_name": str(manifest.model["checkpoint"]),
        "dtype": str(manifest.device["dtype"]),
        "use_chat_template": False,
        "system_prompt": "",
        "prompt_template": "",
        "kv_budget": 0,
        "attn_implementation": str(manifest.backbone["attn_implementation"]),
        "rope_style": rope.layout,
        "rope_type": str(rope.parameters.get("rope_type", "default")),
        "inv_freq": list(rope.inv_freq),
        "sampled_heads": [[layer.layer, head] for layer in measured.layers for head in range(layer.heads["q_pre"])],
    }


def _rope(measured: Measured) -> Rope:
    """How all layers turn their queries: the file has one way for all, and of all dimensions.

    Raises:
        RunError: they differ, or turn otherwise.
    """
    ropes = [measured.run.rope(layer.layer) for layer in measured.layers]
    first = ropes[0]
    for layer, rope in zip(measured.layers, ropes, strict=True):
        if told := _unlike(layer, rope):
            raise RunError(f"layer {layer.layer} {told}: triattention takes all of a vector as pairs that RoPE turns")
        if (rope.inv_freq, rope.layout) != (first.inv_freq, first.layout):
            raise RunError(
                f"layer {layer.layer} turns otherwise than layer 0: triattention has one RoPE for all layers"
            )
    return first


def _unlike(layer: LayerGeometry, rope: Rope) -> str:
    if rope.rotary != layer.dims["q_pre"]:
        return f"turns {rope.rotary} of {layer.dims['q_pre']} dimensions"
    if rope.until is not None:
        return "turns by other frequencies in longer texts"
    return "pairs dimensions otherwise after RoPE than before it" if rope.layout == "interleaved_to_half" else ""
