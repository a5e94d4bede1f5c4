"""A probe of a model that is somebody else's leaves no trace in it, and nobody who watches the model sees it.

While it runs, the hooks that a user has registered are aside; those of the libraries by which a model computes
(offloading, adapters, sharded weights) stay. Afterwards every module has its attributes, buffers and flags as before,
such as the frequencies that a dynamic rotary embedding replaces as it runs, and random numbers go on where they were.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sniffer.errors import UnsupportedModelError
from sniffer.tap import set_aside

HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_pre_hooks")) and "forward" in name)
"""The attributes in which a module keeps the hooks of its calls."""

FIXED = {*vars(nn.Module())} - {"training", "_buffers", "_non_persistent_buffers_set"}
"""What a forward never touches, or what is given back in its own way."""

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

LARGE = 1 << 20
"""Bytes of a tensor beyond which it is not copied, but watched: no forward in evaluation mode writes to such ones."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What runs inside leaves the model, the random numbers and an open tap as they were.

    Raises:
        UnsupportedModelError: a forward writes to a large buffer, which cannot be given back.
    """
    parts = list(model.modules())
    with ExitStack() as after, set_aside(), _random_numbers(model), _casts_not_kept():
        for part in parts:
            after.callback(_State(part).restore)
            for name in HOOKS:
                after.callback(_without_watchers(getattr(part, name)))
        yield


class _State:
    """The attributes and buffers of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.plain = {name: value for name, value in vars(module).items() if name not in FIXED}
        inside = [value for value in self.plain.values() if isinstance(value, (dict, list, set))]
        self.containers = [(one, copy(one)) for one in inside]
        held = [value for value in (*self.plain.values(), *module._buffers.values()) if _has_values(value)]
        self.tensors = [(one, _version(one), one.clone() if one.nbytes <= LARGE else None) for one in held]

    def restore(self) -> None:
        own = vars(self.module)
        for name in own.keys() - self.plain.keys() - FIXED:
            del own[name]
        own.update(self.plain)
        for container, content in self.containers:
            _refill(container, content)
        for tensor, version, value in self.tensors:
            if version is None or _version(tensor) != version:
                self._put_back(tensor, value)

    def _put_back(self, tensor: Tensor, value: Tensor | None) -> None:
        if value is not None:
            with torch.inference_mode():
                tensor.copy_(value)
        elif _version(tensor) is not None:
            name = type(self.module).__name__
            raise UnsupportedModelError(
                f"a forward of this model writes to a tensor of {tensor.nbytes:,} bytes in {name}: it cannot be probed"
                " without a change that stays"
            )


def _has_values(value: Any) -> bool:
    """Whether it is a tensor whose values are here; those of an offloaded one are elsewhere."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.device.type != "meta"


def _version(tensor: Tensor) -> int | None:
    """Counts what is written to a tensor; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


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
