"""How many tokens share a forward on a GPU, where nobody says: as many as its free memory has room for.

What is free depends on the moment, so what was chosen is saved with the run (config.yaml, rerun.yaml): the same run
again, resumed or elsewhere, has the same batches. Powers of two, so that two moments mostly choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sniffer.forward.estimate import PINNED_BATCHES, largest_batch
from sniffer.types import WorkingMemory

BUDGETS = (32768, 16384, 8192, 4096, 2048)
"""Padded tokens per forward. More than the first hides no more of what launching costs; less than the last is a
document a batch."""

DEVICE_SHARE = 0.5
"""Of the free memory of the GPU: its allocator needs room between blocks, and later documents may be longer."""

PINNED_SHARE = 0.125
"""Of the available memory of the host, for rows on their way (sniffer/forward/transfer.py)."""


def fitting(
    lengths: Sequence[int],
    needs: Callable[[int, int], WorkingMemory | None],
    rows_bytes: Callable[[int], float],
    device_free: int,
    available: float,
) -> int | None:
    """The largest budget whose batches fit, the smallest where none does; None where nobody knows.

    Args:
        lengths: tokens of the documents read so far.
        needs: what a forward of so many rows and tokens takes beside the weights; None where nobody knows.
        rows_bytes: captured rows of the largest batch, by budget.
        device_free: bytes; `available` those of the host.
    """
    known: dict[tuple[int, int], WorkingMemory | None] = {}
    for budget in BUDGETS:
        shape = largest_batch(lengths, budget)
        needed = known[shape] if shape in known else known.setdefault(shape, needs(*shape))
        if needed is None:
            return None
        # 1 x 17,000 tokens of 32,768 are the batch with the longest document; 2 x 16,000 is one with more tokens.
        fuller = max(1.0, min(budget, sum(lengths)) / (shape[0] * shape[1]))
        on_device = fuller * needed.peak + rows_bytes(budget)
        pinned = PINNED_BATCHES * rows_bytes(budget)
        if on_device <= DEVICE_SHARE * device_free and pinned <= PINNED_SHARE * available:
            return budget
    return BUDGETS[-1]
