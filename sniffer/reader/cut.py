"""Cutting what is read in order into pieces of a size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

One = TypeVar("One")


def cut(share: Iterable[One], most: int, size: Callable[[One], int]) -> Iterator[list[One]]:
    """In their order, as many at a time as are of `most` together, and one at least."""
    together: list[One] = []
    total = 0
    for one in share:
        here = size(one)
        if together and total + here > most:
            yield together
            together, total = [], 0
        together.append(one)
        total += here
    if together:
        yield together
