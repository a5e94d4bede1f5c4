"""Short steps on many cores: some of the heads on each, with one wait at the end.

Shared out by PyTorch itself, every step would end with a wait of all cores for the last one; the steps of moments are
so short that they would mostly wait, and where other programs have some of the cores, in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from threading import Barrier

import torch
from torch import Tensor


def by_heads(call: Callable[[slice, Tensor], None], states: Tensor) -> None:
    """Calls with some heads (dimension 1), and which they are, after the other; on a processor beside each other."""
    _, heads, _, dim = states.shape
    threads = min(_cores(states.device), heads, max(1, heads * dim // WORTH))
    bounds = [heads * place // threads for place in range(threads + 1)]
    on_cores([partial(call, slice(*both), states[:, slice(*both)]) for both in pairwise(bounds)], states.device)


def on_cores(calls: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Makes calls of many short steps; where these are taken on a processor, each call takes a core of its own."""
    if (cores := _cores(device)) == 1:
        for call in calls:
            call()
    else:
        list(_pool(cores).map(_without_grad, calls))


def _cores(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


def _without_grad(call: Callable[[], None]) -> None:
    with torch.inference_mode():  # which belongs to a thread
        call()


WORTH = 512
"""Values at a position, of so many heads that another core is worth its while."""


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads of one core each; how many cores PyTorch takes elsewhere stays as it is."""
    together = Barrier(threads)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread's first look takes what was said last, wherever: here, and not later
        together.wait()

    made = ThreadPoolExecutor(threads, "moments")
    list(made.map(lambda _: begin(), range(threads)))
    torch.set_num_threads(threads)  # what threads that are made later begin with
    return made
