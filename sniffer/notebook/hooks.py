"""Hooks on the modules of somebody's model, and whether a call that they have seen begin is under way still."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn


class Hook:
    """A copy of the model takes its hooks along, but not all that is captured; a model that is saved leaves them."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, *arguments: Any) -> None:
        self._act(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Hook, (_nothing,)


def _nothing(*_: Any) -> None: ...


CALLS = {nn.Module.__call__.__code__, nn.Module._call_impl.__code__}
"""The code that is on the stack for as long as a module is called."""


def is_running(module: nn.Module, thread: int) -> bool:
    """Whether a thread is within a call of a module: an interrupt ends one without a word to its hooks."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code in CALLS and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False
