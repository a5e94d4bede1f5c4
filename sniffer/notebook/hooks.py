"""Hooks on the modules of somebody's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
