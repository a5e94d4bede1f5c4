"""How many threads: float sums depend on it, and cores bound it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def same_threads(threads: int | None) -> Iterator[None]:
    """Float sums depend on the number of threads: uses the recorded one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_cores() -> int:
    """Of those that the machine has, the ones that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
