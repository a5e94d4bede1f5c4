"""What the keys of the config group `model` may be; needs neither torch nor transformers."""

from __future__ import annotations

import re
from typing import Any

from sniffer.errors import ConfigError

WEIGHTS = ("pretrained", "random")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")
KERNELS = ("flash", "efficient", "math", "cudnn")
"""Of torch's own attention (sdpa)."""


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(choices)}")


def check_random(seed: int, *, put_on: bool) -> None:
    """Of random weights; `put_on`: something is asked for that needs those of a checkpoint."""
    if put_on:
        raise ConfigError("model.adapter and model.allow_missing are for the weights of a checkpoint: drop them")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ConfigError(f"model.seed={seed} must be from -2^63 to 2^64 - 1")


def check_device(device: str, device_map: Any) -> None:
    if not DEVICE.fullmatch(device):
        raise ConfigError(f"model.device={device!r} is no device: use auto, cpu, cuda, cuda:1 or mps")
    if device_map is None:
        return
    if device != "auto":
        raise ConfigError("model.device and model.device_map are both set: leave one of them out")
    words = (
        [device_map]
        if isinstance(device_map, str)
        else list(device_map.values())
        if isinstance(device_map, dict)
        else []
    )
    if not words or not all(type(word) is int or isinstance(word, str) and word.strip() for word in words):
        raise ConfigError(
            f"model.device_map={device_map} is no map: give {', '.join(DEVICE_MAPS)}, or a mapping from modules to "
            "devices"
        )


def kernels_of(value: Any, attention: str) -> list[str] | None:
    """The kernels that sdpa may use, as a list; None for those that suit.

    Raises:
        ConfigError: one is none, or the model is not to attend by sdpa.
    """
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or any(name not in KERNELS for name in names):
        raise ConfigError(f"model.sdpa_kernels={value} is no list of kernels: give some of {', '.join(KERNELS)}")
    if attention not in ("auto", "sdpa"):
        raise ConfigError(f"model.sdpa_kernels is for sdpa, and model.attn_implementation={attention}: leave one out")
    return list(dict.fromkeys(names))
