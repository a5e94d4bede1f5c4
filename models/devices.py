"""Where a model goes: the device that was asked for, or the best there is, and what is told where that is none."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch

from sniffer.errors import ConfigError

log = logging.getLogger(__name__)

DRIVERS = {"NVIDIA": (Path("/proc/driver/nvidia/version"), "nvidia-smi"), "AMD": (Path("/dev/kfd"), "rocm-smi")}
"""By which a machine is known to have a GPU: a file of its driver, or the driver's tool."""

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def device_of(name: str) -> torch.device:
    """`auto` is the best device there is; a GPU becomes the current one, which some kernels take without being told.

    Of several GPUs, each process of a sweep in parallel takes its own.

    Raises:
        ConfigError: torch sees no such device.
    """
    device = _best() if name == "auto" else _named(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _named(name: str) -> torch.device:
    device = torch.device(name)
    there = _count(device.type)
    if (device.index or 0) >= there:
        raise ConfigError(f"model.device={name}: torch sees {there} such devices here; use model.device=auto")
    return device


def _best() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", place) if (place := _place()) is not None else torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if reason := why_no_gpu():
        log.warning("the model runs on the processor: %s; model.device=cpu says that this is meant", reason)
    return torch.device("cpu")


def _place() -> int | None:
    """The GPU of this process among several that run side by side; None where it is alone, or there is one GPU."""
    process, there = multiprocessing.current_process(), torch.cuda.device_count()
    if multiprocessing.parent_process() is None or not process._identity or there < 2:
        return None
    return (process._identity[0] - 1) % there


def why_no_gpu() -> str:
    """Why torch sees no GPU although a driver is there; empty where none is, or where the user has hidden it."""
    makers = [maker for maker, (file, tool) in DRIVERS.items() if file.exists() or shutil.which(tool)]
    if not makers or any(os.environ.get(name, "unset").strip() in ("", "-1") for name in VISIBLE):
        return ""
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"there is an {makers[0]} driver, and torch {torch.__version__} is built without it: see pytorch.org"
    return (
        f"there is an {makers[0]} driver, and torch {torch.__version__} sees no GPU (is the driver older than its CUDA "
        f"{torch.version.cuda}, or CUDA_VISIBLE_DEVICES wrong?)"
    )


def check_device_map() -> None:
    """Raises ConfigError where what spreads a model is not installed."""
    if find_spec("accelerate") is None:
        raise ConfigError("model.device_map needs accelerate: pip install accelerate, or use model.device")


def _count(kind: str) -> int:
    """How many devices of a kind there are."""
    if kind in ("cuda", "xpu"):
        return int(getattr(torch, kind).device_count())
    return int(kind == "cpu" or torch.backends.mps.is_available())
