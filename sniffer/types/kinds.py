"""Kinds: which vectors of a token there are to capture, as a table. A new kind is a row of it.

A *kind* names a vector of attention. A *draw* is one set of kept positions; kinds of one token side share it, and the
heads of that side: query heads for the kinds of draw q, key heads for those of draw k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What is captured of a token at one layer and head.

    Attributes:
        name: in the configuration, in paths and tables, and of the field that the tap shows it under.
        draw: whose positions and heads it has, so that q_pre has q's, and k_pre and v have k's.
        pre: it is what attention would receive if RoPE were the identity, which costs statements beside the model's.
        statistics: its values are no vector but what a query does with its keys, in columns of their own
            (statistics.py).
    """

    name: str
    draw: str
    pre: bool = False
    statistics: bool = False

    def shown(self, seen: Any) -> Any:
        """Its tensor (batch, heads, seq, dim) in what a tap shows (sniffer.tap.Seen); None where it shows none."""
        return getattr(seen, self.name)


TABLE = (
    Kind("q", "q"),
    Kind("k", "k"),
    Kind("v", "k"),
    Kind("q_pre", "q", pre=True),
    Kind("k_pre", "k", pre=True),
    Kind("attention", "q", statistics=True),
)

KIND = {kind.name: kind for kind in TABLE}
"""By name."""

ALL_KINDS = tuple(KIND)

KINDS = tuple(kind.name for kind in TABLE if not kind.statistics)
"""Vectors. q, k, v: what attention receives. q_pre, k_pre: what it would receive if RoPE were the identity."""

MAIN_KINDS = tuple(kind.name for kind in TABLE if not kind.statistics and not kind.pre)

ATTENTION = "attention"
"""The kind of statistics."""


def draw_of(pair: tuple[int, str]) -> tuple[int, str]:
    """The (layer, draw) of a (layer, kind)."""
    layer, kind = pair
    return layer, KIND[kind].draw
