"""A sampler for queries and another for keys: few of the one and all of the other, say, in one pass.

Its sides are samplers of their own, with keys, buckets and probabilities of their own; what is kept of a side is what
a run with that sampler alone would keep of it, position by position. A bucket's number means something within its side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np
from jaxtyping import Int32

from sniffer.errors import ConfigError
from sniffer.sampler.base import MADE, SEED_PARTS, Sampler
from sniffer.sampler.picker import Picker
from sniffer.types import Document, Picks, Sections, TokenBatch

SIDES = ("q", "k")
"""What draws are for (sniffer.types.KINDS): k's are v's too."""


@dataclass(frozen=True)
class PerSide(Sampler):
    """Queries, q_pre too, by one sampler; keys, k_pre and v too, by another. See each for its law."""

    formula = "queries by the law of sampler.q, keys and values by that of sampler.k"
    home: ClassVar[str] = "sniffer.sampler"
    seed_by: ClassVar[list[str]] = list(SEED_PARTS)  # type: ignore[misc] # each side has its own

    keep_sections: ClassVar[Any] = property(lambda self: self._kept_by_a_side)  # type: ignore[misc] # of either

    q: Any = field(default=None, metadata=MADE)
    k: Any = field(default=None, metadata=MADE)

    def __post_init__(self) -> None:
        for name in SIDES:
            if not isinstance(getattr(self, name), Sampler) or isinstance(getattr(self, name), PerSide):
                raise ConfigError(f"sampler.{name} is no sampler for one side: choose with sampler@sampler.{name}=all")

    @property
    def _kept_by_a_side(self) -> list[str]:
        return list(dict.fromkeys(name for side in SIDES for name in self.side(side).keep_sections))

    def side(self, draw: str) -> Sampler:
        found: Sampler = self.q if draw == "q" else self.k
        return found

    def bucket(self, positions: Any) -> NoReturn:
        raise TypeError("a sampler per side has a law for each: ask side(draw)")

    def probability(self, positions: Any) -> NoReturn:
        raise TypeError("a sampler per side has a law for each: ask side(draw)")


class PerSidePicker(Picker):
    """Draws of both sides, each by a picker of its own."""

    def __init__(self, sampler: PerSide, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed
        self._sides = {name: Picker(sampler.side(name), seed) for name in SIDES}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)

    def side(self, draw: str) -> Picker:
        return self._sides[draw]

    def pick(self, batch: TokenBatch, layer: int, draw: str) -> Picks:
        return self._sides[draw].pick(batch, layer, draw)

    def positions(self, document: Document, layer: int, draw: str) -> Int32[np.ndarray, " picks"]:
        return self._sides[draw].positions(document, layer, draw)

    def key(self, document: Document, layer: int, draw: str) -> int:
        return self._sides[draw].key(document, layer, draw)

    def expected(self, n_tokens: Sequence[int], sections: Sequence[Sections | None] = ()) -> NoReturn:
        raise TypeError("a sampler per side expects something else of each: ask side(draw)")

    def probability_by_bucket(self, n_positions: int) -> NoReturn:
        raise TypeError("a sampler per side has a law for each: ask side(draw)")

    def buckets_until(self, n_positions: int) -> NoReturn:
        raise TypeError("a sampler per side has buckets for each: ask side(draw)")

    def span(self, bucket: int) -> NoReturn:
        raise TypeError("a sampler per side has buckets for each: ask side(draw)")


def picker_of(sampler: Sampler, seed: int) -> Picker:
    """What draws by a sampler."""
    return PerSidePicker(sampler, seed) if isinstance(sampler, PerSide) else Picker(sampler, seed)
