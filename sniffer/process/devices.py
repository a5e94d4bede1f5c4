"""What computes, by name: for the manifest, and for the first line that a run logs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DRIVER = Path("/proc/driver/nvidia/version")
"""Where the driver says which one it is."""


def hardware(device: torch.device) -> dict[str, str]:
    """A GPU's name, memory and compute capability, and the versions of what drives it; nothing of another device."""
    import torch

    if device.type != "cuda":
        return {}
    of = torch.cuda.get_device_properties(device)
    found = {
        "name": torch.cuda.get_device_name(device),
        "memory": f"{of.total_memory / (1 << 30):.1f} GiB",
        "capability": f"{of.major}.{of.minor}",
        "driver": driver(),
        "cuda": torch.version.cuda or getattr(torch.version, "hip", None),
        "cudnn": torch.backends.cudnn.version(),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def driver() -> str | None:
    """The version of NVIDIA's driver, None where there is none or it does not say."""
    try:
        said = re.search(r"Module.*?\s(\d+(?:\.\d+)+)", DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return said[1] if said else None


def device_line(device: Mapping[str, Any], backbone: Mapping[str, Any], threads: int | None) -> str:
    """On what a run computes, and by what.

    Args:
        device, backbone, threads: as in a manifest.
    """
    called = {"memory": "", "driver": "driver ", "cuda": "CUDA ", "cudnn": "cuDNN "}
    about = ", ".join(f"{word}{device[name]}" for name, word in called.items() if name in device)
    attention = backbone.get("attn_implementation")
    kernels = ", ".join(backbone.get("sdpa_kernels", ()))
    parts = [
        f"computing on {device.get('name', device.get('type'))}{f' ({about})' if about else ''}",
        f"in {device.get('dtype')}",
        *([f"with {attention} attention{f' ({kernels})' if kernels else ''}"] if attention else []),
        *([f"on {threads} threads"] if device.get("type") == "cpu" else []),
    ]
    return " ".join(parts)
