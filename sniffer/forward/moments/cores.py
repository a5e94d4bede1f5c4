"""Short steps on many cores: some of the heads on each, with one wait at the end.

Shared out by PyTorch itself, every step would end with a wait of all cores for the last one; the steps of moments are
so short that they would mostly wait, and where other programs have some of the cores, in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def by_heads(call: Callable[[Tensor], Result], states: Tensor) -> Sequence[Result]:
    """What a call gives for some of the heads (dimension 1) after the other; on a processor, beside each other."""
    threads = min(torch.get_num_threads(), states.shape[1]) if states.device.type == "cpu" else 1
    if threads <= 1:
        return [call(states)]
    return list(_pool(torch.get_num_threads()).map(_without_grad(call), states.tensor_split(threads, dim=1)))


def _without_grad(call: Callable[[Tensor], Result]) -> Callable[[Tensor], Result]:
    def called(states: Tensor) -> Result:
        with torch.inference_mode():  # which belongs to a thread
            return call(states)

    return called


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads of one core each; how many cores PyTorch takes elsewhere stays as it is."""
    together = Barrier(threads)
    made = ThreadPoolExecutor(threads, "moments", initializer=torch.set_num_threads, initargs=(1,))
    list(made.map(lambda _: together.wait(), range(threads)))
    torch.set_num_threads(threads)  # what threads that are made later begin with
    return made
