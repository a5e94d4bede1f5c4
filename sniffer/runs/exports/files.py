"""Small files of an export, with plain words where a disk is full."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], **metadata: str) -> None:
    """A safetensors file, as torch, transformers and their kin read them."""
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    path.write_bytes(save(whole, metadata={"format": "pt", **metadata}))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
