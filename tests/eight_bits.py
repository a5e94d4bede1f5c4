"""Checkpoints in eight bits as compressed-tensors writes them, made by numpy: of linear layers a scale for each row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def save_in_eight_bits(base: Path, folder: Path, *, states: bool) -> Path:
    """The checkpoint `base` with weights in eight bits, four of a row in a number of 32.

    With `states` layers round what they multiply too, by the token, and a weight is a number of its own.
    """
    shutil.copytree(base, folder)
    saved: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        saved[name] = weight
        if name.endswith("_proj.weight"):
            steps, scale = in_steps(weight.float().numpy())
            if states:
                saved[name] = torch.from_numpy(steps.astype(np.int8))
            else:
                del saved[name]
                saved[f"{name}_packed"] = torch.from_numpy((steps + 128).astype(np.uint8).view("<i4"))
                saved[f"{name}_shape"] = torch.tensor(steps.shape)
            saved[f"{name}_scale"] = torch.from_numpy(scale).to(weight.dtype)
    save_file(saved, folder / "model.safetensors", {"format": "pt"})
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**bits, "strategy": "channel", "dynamic": False}}
    group["input_activations"] = {**bits, "strategy": "token", "dynamic": True} if states else None
    told = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    told["format"] = "int-quantized" if states else "pack-quantized"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {**told, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def in_steps(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers from -127 to 127, and what they are multiplied by, for each row."""
    scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    return np.rint(weight / scale), scale
