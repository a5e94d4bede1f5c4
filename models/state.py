"""What a module keeps from one forward to the next, and how it is put back.

Some rotary embeddings change themselves while they run: those with dynamic scaling replace their frequencies when a
forward is longer than any before, and go on with them afterwards. What a document's vectors are would then depend on
the documents before it; and a probe of ours would leave something behind in a model that is somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from sniffer.errors import UnsupportedModelError

FIXED = {*vars(nn.Module())} - {"training", "_buffers", "_non_persistent_buffers_set"}
"""What a forward never touches, or what is given back in its own way: parameters, parts and hooks."""

LARGE = 1 << 20
"""Bytes of a tensor beyond which it is not copied, but watched: no forward in evaluation mode writes to such ones."""


class ModuleState:
    """The attributes, buffers and flags of one module, as they are now; they can be put back any number of times."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._plain = {name: value for name, value in vars(module).items() if name not in FIXED}
        inside = [value for value in self._plain.values() if isinstance(value, (dict, list, set))]
        self._containers = [(one, copy(one)) for one in inside]
        held = [value for value in (*self._plain.values(), *module._buffers.values()) if _has_values(value)]
        self._values = [(one, one.clone() if one.nbytes <= LARGE else None) for one in held]
        self._versions = [_version(one) for one, _ in self._values]

    def restore(self) -> None:
        """Puts back what was there, and takes away what was not; only tensors that were written to are copied.

        Raises:
            UnsupportedModelError: a large tensor was written to, of which there is no copy.
        """
        own = vars(self._module)
        for name in own.keys() - self._plain.keys() - FIXED:
            del own[name]
        own.update(self._plain)
        for container, content in self._containers:
            _refill(container, content)
        for (tensor, value), version in zip(self._values, self._versions, strict=True):
            if version is None or _version(tensor) != version:
                self._put_back(tensor, value)
        self._versions = [_version(tensor) for tensor, _ in self._values]

    def _put_back(self, tensor: Tensor, value: Tensor | None) -> None:
        if value is not None:
            with torch.inference_mode():
                tensor.copy_(value)
        elif _version(tensor) is not None:
            name = type(self._module).__name__
            raise UnsupportedModelError(
                f"a forward of this model writes to a tensor of {tensor.nbytes:,} bytes in {name}: the change would"
                " stay, and be seen by what runs afterwards"
            )


@contextmanager
def kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever happens inside, these modules are afterwards as they were."""
    states = [ModuleState(module) for module in modules]
    try:
        yield
    finally:
        for state in states:
            state.restore()


def simple_parts(root: nn.Module) -> list[nn.Module]:
    """The parts of a model that have no parts, or nothing to learn; rotary embeddings are among them.

    Torch's own layers are left out: what they are given has no say in what they do with the next.
    """
    own = [part for part in root.modules() if not type(part).__module__.startswith("torch.nn")]
    tables = (nn.Embedding, nn.ModuleList)
    simple = [part for part in own if not part._modules or next(part.parameters(), None) is None]
    return [part for part in simple if not isinstance(part, tables)]


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
