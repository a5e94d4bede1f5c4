"""Keeps the memory that one forward pass frees for the next one.

On a CPU, PyTorch takes its memory from the C library. glibc hands freed memory back to the system as soon as some
64 MB lie together, and takes blocks of 32 MB and more from it one by one. The next layer then asks for the same
again, and each page of it costs a fault: of a forward at 1 x 2048, a tenth of the processor time (`python -m
benchmarks heap`). mallopt(3) says what may be kept.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""

CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

BLOCK = 64 * 1024**2
"""Bytes beyond which a block is taken from the system by itself: those of a document of 128k tokens still are."""

KEPT = 8 * BLOCK
"""Bytes that may lie free at the end of the heap."""


def keep_freed_memory() -> bool:
    """For the rest of this process; True if it could be had.

    Nothing happens without glibc, or where the environment says how it is to do (`CHOSEN`).
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in CHOSEN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Both or neither: setting one of them alone ends the other's adapting to what a program frees.
    return bool(mallopt(M_MMAP_THRESHOLD, BLOCK) and mallopt(M_TRIM_THRESHOLD, KEPT))
