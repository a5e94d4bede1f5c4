"""Which calls of a model begin something, and which go on with an earlier call.

A generation calls the model for its prompt, and then a token at a time: with the cache that the prompt has filled, or
without one for all tokens again. Long prompts come in chunks. Only what begins is captured.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from jaxtyping import Int32
from torch import Tensor

from sniffer.notebook.call import Call, earlier_tokens


class CallHistory:
    """What is remembered of earlier calls.

    `taken_back` counts captured tokens that a cache has lost since.
    """

    def __init__(self) -> None:
        self.taken_back = 0
        self._last: Int32[np.ndarray, "batch seq"] | None = None
        self._filled: dict[int, tuple[weakref.ref[Any], int]] = {}

    def has_cache_of_earlier(self, call: Call) -> bool:
        """Whether the call brings a cache that an earlier one has filled.

        Raises:
            CaptureError: its cache does not say what it holds.
        """
        held = earlier_tokens(call.cache)
        if held:
            self._compare(call.cache, held)
        elif call.cache is not None:
            self._filled[id(call.cache)] = (weakref.ref(call.cache), call.shape[1])
        return held > 0

    def repeats_the_last(self, call: Call) -> bool:
        """Whether the call has no cache, and its rows are those of the call before with a token more each."""
        if call.cache is not None:
            return False
        tokens = as_array(call.tokens)
        last, self._last = self._last, tokens
        if last is None or last.shape != (tokens.shape[0], tokens.shape[1] - 1):
            return False
        return {row.tobytes() for row in tokens[:, :-1]} <= {row.tobytes() for row in last}

    def forget_the_last(self) -> None:
        """Nothing was kept of the last call, so nothing goes on with it."""
        self._last = None

    def _compare(self, cache: Any, held: int) -> None:
        """A cache that holds less than the captured call put into it: wrong guesses of assisted decoding."""
        known, length = self._filled.get(id(cache), (None, 0))
        if known is not None and known() is cache and held < length:
            self.taken_back += length - held
            self._filled[id(cache)] = (known, held)


def as_array(tokens: Tensor) -> Int32[np.ndarray, "batch seq"]:
    """Token ids on the CPU."""
    return tokens.cpu().numpy().astype(np.int32)
