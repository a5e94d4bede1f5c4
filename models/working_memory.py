"""What a forward needs on its device beside the weights, found out without either: with fake tensors.

Each operation's outputs are noted as they come to be, and are gone when the model lets go of them; the largest sum of
what was there at one time is what an allocator has to find. Attention is taken to be computed in one piece, as torch's
fused kernels do; `eager` computes rows x heads x tokens x tokens numbers, and is counted so.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from sniffer.types import WorkingMemory

from .witness import swap_attribute


class Ledger(TorchDispatchMode):
    """Counts the bytes that are in use while it is open; `peak` is the most, `mask` the largest mask among them.

    `sizes` are bytes of a value by type, where they are not the type's own.
    """

    def __init__(self, sizes: Mapping[torch.dtype, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.now = self.peak = self.mask = 0
        self._there: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._enter(leaf)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._there:
            return
        size = storage.nbytes()
        if tensor.dtype in self.sizes:
            size = size * self.sizes[tensor.dtype] // tensor.dtype.itemsize
        self._there[key] = size
        weakref.finalize(storage, self._leave, key)
        self.now += size
        self.peak = max(self.peak, self.now)
        # (rows, 1 or heads, tokens, tokens), of truth values or of numbers to add.
        if tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[2] == tensor.shape[3] > 1:
            self.mask = max(self.mask, size)

    def _leave(self, key: int) -> None:
        self.now -= self._there.pop(key, 0)


def working_memory(
    forward: Any, rows: int, tokens: int, sizes: Mapping[torch.dtype, int] = MappingProxyType({})
) -> WorkingMemory:
    """Of a forward of so many rows and tokens; to be called where tensors are fake. `sizes` as in `Ledger`."""
    ids = torch.zeros((rows, tokens), dtype=torch.long)
    with _not_packed(), Ledger(sizes) as ledger:
        forward(input_ids=ids)
    return WorkingMemory(rows, tokens, ledger.peak, ledger.mask)


@contextmanager
def _not_packed() -> Iterator[None]:
    """Has transformers know that rows hold one text each, which it reads off positions where these have values.

    Without that it makes masks that a real forward does not make.
    """
    name = "find_packed_sequence_indices"
    undo = swap_attribute(masking_utils, name, lambda *_, **__: None) if hasattr(masking_utils, name) else None
    try:
        yield
    finally:
        if undo is not None:
            undo()
