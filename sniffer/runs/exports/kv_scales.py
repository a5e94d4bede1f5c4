"""kv_scales: scales of an FP8 key-value cache, as compressed-tensors names them and vLLM reads them.

Two strategies, a folder each: `tensor` has one scale for all keys of a layer and one for all values, shape (1);
`attn_head` one for each key head, shape (key heads, 1, 1). A scale is the largest absolute value over 448, the largest
number of float8_e4m3fn; keys are those after RoPE, which the cache holds. In each folder lie kv_scales.safetensors,
with tensors like model.layers.0.self_attn.k_scale in float32, quantization_config.json for the checkpoint's config.json
and weight_map.json for its model.safetensors.index.json, where it has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.runs.exports.files import write_json, write_tensors
from sniffer.runs.exports.measured import Measured

LARGEST = 448.0
"""Of float8_e4m3fn."""

STRATEGIES = ("tensor", "attn_head")
FILE = "kv_scales.safetensors"


def write(run: Run, place: Path) -> list[str]:
    measured = Measured(run, "kv_scales", ["k", "v"], full=False)
    prefix = _prefix(run)
    largest = {
        f"{prefix}{layer.module}.{kind}_scale": [one.absmax.max() for one in measured.of(layer.layer, kind)]
        for layer in measured.layers
        for kind in ("k", "v")
    }
    if silent := [name for name, of_heads in largest.items() if not min(of_heads)]:
        raise RunError(f"a head of {silent[0]} was zero at all positions: there is no scale for it")
    for strategy in STRATEGIES:
        (folder := place / strategy).mkdir()
        write_tensors(folder / FILE, {name: scale(of_heads, strategy) for name, of_heads in largest.items()})
        write_json(folder / "quantization_config.json", {"quantization_config": quantization_config(strategy)})
        write_json(folder / "weight_map.json", {"weight_map": dict.fromkeys(largest, FILE)})
    return [
        f"scales of {len(measured.layers)} layers, by tensor and by attention head: copy {FILE} of one beside the "
        "checkpoint, and merge the two others into its config.json and its model.safetensors.index.json"
    ]


def scale(of_heads: Sequence[float], strategy: str) -> Float32[np.ndarray, "*heads"]:
    """From the largest absolute value of each key head: (1) for all of them, or (key heads, 1, 1)."""
    scales = np.array(of_heads, np.float32) / np.float32(LARGEST)
    return scales.max(keepdims=True) if strategy == "tensor" else scales[:, None, None]


def quantization_config(strategy: str) -> dict[str, Any]:
    """Of a checkpoint of which nothing but the key-value cache is quantised."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": strategy,
            "symmetric": True,
            "dynamic": False,
        },
    }


def _prefix(run: Run) -> str:
    """What stands before a layer's name in the checkpoint: scales of another name would be passed over.

    Raises:
        RunError: it is not known.
    """
    import transformers

    config = run.model_config
    if config.get("kv_lora_rank"):
        raise RunError("a cache of this model holds what keys and values are made of (MLA), not these: no kv_scales")
    named = config.get("architectures") or [""]
    model = getattr(transformers, named[0], None)
    base = getattr(model, "base_model_prefix", "")
    if not named[0].endswith("ForCausalLM") or not base:
        raise RunError(f"how a checkpoint of {named[0] or config.get('model_type')} names its layers is not known here")
    if odd := [layer.module for layer in run.manifest.geometry if not layer.module.endswith(".self_attn")]:
        raise RunError(f"scales are of modules named self_attn, where vLLM looks for them: this model has {odd[0]}")
    return f"{base}."
