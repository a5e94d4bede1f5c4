"""The largest numbers that a run can have, and a manifest with others is none of ours.

They follow from the columns of a part (layers and heads are 16-bit numbers, buckets and positions 32-bit ones) and from
what any machine can do. Whoever reads a manifest may count, draw or make room by its numbers: a few characters could
ask for a terabyte, so they are looked at first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

LAYERS = HEADS = (1 << 15) - 1
DIM = 1 << 20
BUCKET = (1 << 31) - 1
THREADS = 1024
LARGEST = (1 << 63) - 1
"""Of counts, rows and bytes."""

ROWS_PER_BYTE = 16
"""Of a part: token ids of real text take more, whatever the vectors are."""

TOKENS = 1 << 25
"""Of one document. Its draws take a table of a gigabyte; the longest context of any model is a third of it."""
