"""A probe of a model that is somebody else's leaves no trace in it, and nobody who watches the model sees it.

While it runs, the hooks that a user has registered are aside; those of the libraries by which a model computes
(offloading, adapters, sharded weights) stay. Afterwards every module has its attributes, buffers and flags as before,
such as the frequencies that a dynamic rotary embedding replaces as it runs, and random numbers go on where they were.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sniffer.tap import set_aside

from .state import ModuleState

HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_pre_hooks")) and "forward" in name)
"""The attributes in which a module keeps the hooks of its calls."""

LIBRARIES = {
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "optimum",
    "compressed_tensors",
    "bitsandbytes",
}
"""Whose hooks belong to the model's own computation."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What runs inside leaves the model, the random numbers and an open tap as they were.

    Raises:
        UnsupportedModelError: a forward writes to a large buffer, which cannot be given back.
    """
    parts = list(model.modules())
    with ExitStack() as after, set_aside(), _random_numbers(model), _casts_not_kept():
        for part in parts:
            after.callback(ModuleState(part).restore)
            for name in HOOKS:
                after.callback(_without_watchers(getattr(part, name)))
        yield


def _without_watchers(hooks: dict[int, Any]) -> Callable[[], None]:
    """Takes the hooks of users out, and returns how to put them back, in their order."""
    before = dict(hooks)
    for number, hook in before.items():
        if _home(hook) not in LIBRARIES:
            del hooks[number]

    def restore() -> None:
        hooks.clear()
        hooks.update(before)

    return restore


def _home(hook: Any) -> str:
    """The package a hook comes from."""
    while isinstance(hook, partial) or hasattr(hook, "hook"):
        hook = hook.func if isinstance(hook, partial) else hook.hook
    name = getattr(hook, "__module__", None) or type(hook).__module__
    return str(name).split(".")[0]


@contextmanager
def _random_numbers(model: nn.Module) -> Iterator[None]:
    """The generators of torch, NumPy and Python go on where they were."""
    devices = {one.device for one in (*model.parameters(), *model.buffers()) if one.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _casts_not_kept() -> Iterator[None]:
    """Autocast has been known to keep what it cast for a forward without gradients, such as a probe, for one with."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
