"""What a cache holds, seen from outside: how many tokens, and whether its rows are those that they were.

Between two calls a cache may be reordered, as beams are, lose its last tokens, as wrong guesses of assisted decoding
are, or get other rows. Nothing of it is replaced to find out: the keys of its deepest layer, which depend on
all tokens before, are compared with what they were after the call before.

    beams      keys  a b c  ->  a a c      rows 0 and 1 of the next call go on with row 0 of this one
    guesses    9 tokens     ->  6 tokens   the last three are no tokens of the text
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.notebook.call import earlier_tokens

UNTOLD = "start with a new cache, or leave the cache out"


@dataclass
class Held:
    """A cache after a call: its columns and rows, and the keys of its deepest layer as they were then.

    The layer outlives a cache that nobody has any more, and says then what became of its last tokens. What is
    `quantized` of the keys is another object.
    """

    cache: weakref.ref[Any]
    layer: Any
    keys: Tensor
    quantized: Any
    version: int | None
    columns: int
    batch: int

    @classmethod
    def of(cls, cache: Any, batch: int) -> Held | None:
        """What a cache of `batch` rows holds now; None where it cannot be followed, being none of transformers'."""
        layer = _deepest(cache)
        if layer is None or not type(cache).__module__.startswith("transformers."):
            return None
        version = _version(layer.keys)
        return cls(weakref.ref(cache), layer, layer.keys, _quantized(layer), version, earlier_tokens(cache), batch)

    @property
    def gone(self) -> bool:
        return self.cache() is None

    def is_of(self, cache: Any) -> bool:
        return cache is not None and self.cache() is cache

    def now(self) -> int:
        """How many columns there are by now."""
        cache = self.cache()
        return earlier_tokens(self.layer if cache is None else cache)

    @property
    def untouched(self) -> bool:
        layer = self.layer
        same = layer.keys is self.keys and _quantized(layer) is self.quantized and self.version == _version(self.keys)
        return same and getattr(layer, "_pending_beam_idx", None) is None

    def sources(self, cache: Any, batch: int) -> list[int]:
        """Which row each of `batch` rows of a cache is, of those that were there.

        Raises:
            CaptureError: it cannot be told, or one is none of them.
        """
        layer = _deepest(cache)
        if layer is self.layer and self.untouched and batch == self.batch:
            return list(range(batch))
        if layer is None or _quantized(layer) is not None or self.quantized is not None:
            raise CaptureError(f"the rows of a quantized {type(cache).__name__} were changed, as beams do: {UNTOLD}")
        before, after = self._comparable(layer.keys, self.columns - earlier_tokens(cache))
        free = set(range(len(before)))
        found = []
        for row, keys in enumerate(after):
            same = [one for one in range(len(before)) if torch.equal(before[one], keys)]
            if not same or len(after) != batch:
                raise CaptureError(
                    f"row {row} of this call's cache is no row that the call before left in it: {UNTOLD}"
                )
            # Of equal rows, each takes its own, or one that nobody has taken.
            best = row if row in same else next((one for one in same if one in free), same[0])
            free.discard(best)
            found.append(best)
        return found

    def _comparable(self, keys: Tensor, lost: int) -> tuple[Tensor, Tensor]:
        """The columns that both have, of the keys that were and those that are."""
        before = self.keys
        if keys.shape[1] != before.shape[1] or keys.shape[3] != before.shape[3]:
            raise CaptureError(f"this call's cache is of another model: {UNTOLD}")
        if keys.shape[2] == before.shape[2]:
            # A static cache stays as long as it is, what it has lost included.
            return before.to(keys.device), keys
        before = before[:, :, : before.shape[2] - lost]
        n = min(keys.shape[2], before.shape[2])
        if not n:
            raise CaptureError(f"this call's cache has lost all that can be compared: {UNTOLD}")
        before, keys = before[:, :, before.shape[2] - n :], keys[:, :, keys.shape[2] - n :]
        return before.to(keys.device), keys


def cache_in(returned: Any, names: Sequence[str]) -> Any:
    """The cache that a call returns, if any: of an output by name, or within a tuple."""
    for name in names:
        if hasattr(found := getattr(returned, name, None), "get_seq_length"):
            return found
    parts = returned if isinstance(returned, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def _deepest(cache: Any) -> Any:
    """The last layer of a cache that holds keys; None without one."""
    for layer in reversed(getattr(cache, "layers", ())):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and (keys.numel() or _quantized(layer) is not None):
            return layer
    return None


def _quantized(layer: Any) -> Any:
    return getattr(layer, "_quantized_keys", None)


def _version(tensor: Tensor) -> int | None:
    """How often it was written to; tensors of inference mode do not say."""
    return None if tensor.is_inference() else tensor._version


def nothing() -> None:
    """Once nobody listens, caches have no say any more."""
