"""Keeps the memory that one forward pass frees for the next one.

On a CPU, PyTorch takes its memory from the C library. glibc hands freed memory back to the system as soon as some
64 MB lie together, and takes blocks of 32 MB and more from it one by one. The next layer then asks for the same
again, and each page of it costs a fault: of a forward at 1 x 2048, a tenth of the processor time (`python -m
benchmarks heap`). mallopt(3) says what may be kept.

And how much memory there is to take, container limits respected; and how an error lets go of what it holds.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
from contextlib import suppress
from traceback import clear_frames
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
from pathlib import Path

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""

BLOCKS = (64 * 1024**2, 32 * 1024**2)
"""Bytes beyond which a block is taken from the system by itself: the first that glibc accepts; older ones take no more
than the second."""

KEPT = 8 * BLOCKS[0]
"""Bytes that may lie free at the end of the heap."""


def keep_freed_memory(device: torch.device) -> bool:
    """Asks for it, for the rest of this process, where a model runs on `device`; True if glibc accepted it.

    Nothing happens where that is no CPU, without glibc, or where the environment says how its malloc is to do.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc" or chosen_by_user():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Both or neither: setting one of them alone ends the other's adapting to what a program frees.
    return any(mallopt(M_MMAP_THRESHOLD, block) for block in BLOCKS) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))


def chosen_by_user() -> bool:
    """Whether the environment sets what is kept; mallopt(3) names the variables."""
    named = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys()
    return bool(named) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def available_memory() -> int:
    """Bytes this process can still take, container limits respected."""
    available = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has left; None for a processor, and where it does not say."""
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def _cgroup(name: str) -> int | None:
    """A number from the container's memory controller (cgroup v2, else v1), None where there is none."""
    v1 = {"memory.max": "memory/memory.limit_in_bytes", "memory.current": "memory/memory.usage_in_bytes"}
    for path in (Path("/sys/fs/cgroup", name), Path("/sys/fs/cgroup", v1[name])):
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            continue
    return None


def let_go(error: BaseException | None = None) -> None:
    """Frees what nobody needs any more, on the device too, such as a forward's states in the frames of an error.

    An error knows its frames, and frames their variables, for as long as anyone knows the error.
    """
    pending, seen = [error], {id(None)}
    while pending:
        one = pending.pop()
        if id(one) not in seen and one is not None:
            seen.add(id(one))
            clear_frames(one.__traceback__)
            pending += [one.__cause__, one.__context__]
    gc.collect()
    torch = sys.modules.get("torch")
    for name in ("cuda", "mps", "xpu") if torch is not None else ():
        device = getattr(torch, name)
        # An allocator keeps what it was given back; a device that no tensor was on has none.
        if getattr(device, "is_initialized", device.is_available)():
            with suppress(RuntimeError):  # of a device that has failed
                device.empty_cache()
