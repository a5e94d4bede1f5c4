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

HOUSEKEEPING = {*vars(nn.Module()), "training"}
"""Attributes that every module has; which parameters, submodules and hooks there are is left alone."""


class ModuleState:
    """The buffers and plain attributes of one module, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._plain = {name: value for name, value in vars(module).items() if name not in HOUSEKEEPING}
        self._contents = [(one, copy(one)) for one in self._plain.values() if isinstance(one, (dict, list, set))]
        self._buffers = dict(module._buffers)
        self._passing = set(module._non_persistent_buffers_set)
        self._values = [(one, one.clone()) for one in [*self._buffers.values(), *self._plain.values()] if _held(one)]
        self._versions = [_version(one) for one, _ in self._values]

    def restore(self) -> None:
        """Puts back what was there, and takes away what was not; only tensors that were written to are copied."""
        own = vars(self._module)
        for name in [name for name in own if name not in HOUSEKEEPING and name not in self._plain]:
            del own[name]
        own.update(self._plain)
        for container, content in self._contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        self._module._buffers.clear()
        self._module._buffers.update(self._buffers)
        self._module._non_persistent_buffers_set.clear()
        self._module._non_persistent_buffers_set.update(self._passing)
        for (tensor, value), version in zip(self._values, self._versions, strict=True):
            if version is None or _version(tensor) != version:
                with torch.inference_mode():
                    tensor.copy_(value)
        self._versions = [_version(tensor) for tensor, _ in self._values]


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


def _held(value: Any) -> bool:
    """Whether it is a tensor with values to keep; those of an offloaded one are elsewhere."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.device.type != "meta"


def _version(tensor: Tensor) -> int | None:
    """Counts what has been written to a tensor; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version
