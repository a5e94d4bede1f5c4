"""Loops over the same batches, one after the other in random order: what each takes over the bare one."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from benchmarks.measure import Timed, timed

BARE = "the bare loop"
AGAIN = "the bare loop again"
"""The bare loop among the others: what it takes over itself is the noise."""


@dataclass(frozen=True)
class Spent:
    """What one loop over the batch took, and how much of that was inside each of the ways that watched."""

    whole: Timed
    inside: dict[str, Timed] = field(default_factory=dict)


@dataclass(frozen=True)
class Repeats:
    """The bare loop of each repeat, and what the loops of the same repeat took, by name."""

    bare: list[Timed]
    spent: dict[str, list[Spent]]

    def inside(self) -> dict[str, list[Timed]]:
        """Shares of the forward that they are inside of."""
        shares = defaultdict(list)
        for one in chain.from_iterable(self.spent.values()):
            for name, inside in one.inside.items():
                shares[name].append(inside / one.whole)
        return shares

    def loop(self) -> dict[str, list[Timed]]:
        """Over the bare one of the same repeat."""
        return {
            name: [one.whole / bare for one, bare in zip(these, self.bare, strict=True)]
            for name, these in self.spent.items()
        }


def once(call: Callable[[], object]) -> Spent:
    _, taken = timed(call)
    return Spent(taken)


def repeated(bare: Callable[[], Spent], loops: Mapping[str, Callable[[], Spent]], repeats: int) -> Repeats:
    """Each repeat: the bare loop and the others, in an order of its own each time, so that none always comes first."""
    every, order = {BARE: bare, **loops}, random.Random(0)
    spent: dict[str, list[Spent]] = {name: [] for name in every}
    for _ in range(repeats):
        for name in order.sample(list(every), len(every)):
            spent[name].append(every[name]())
    return Repeats([one.whole for one in spent.pop(BARE)], spent)
