"""From logits to statistics: what each sampled query does with its keys, as columns side by side.

A mass over a range of keys is the difference of two running sums, kept in double precision: then neither the number of
ranges nor their sizes cost anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor

from sniffer.forward.attention.scores import Slice
from sniffer.types import AttentionLayout, Sections


class Weights:
    """Softmax of a slice, and what is asked of it; every answer is (heads, picks) or (heads, picks, values)."""

    def __init__(self, one: Slice, positions: Int[Tensor, " picks"]) -> None:
        self.keys = one.keys
        self.positions = positions
        self.logits = one.logits
        self.values = one.values
        self.lse = one.logits.logsumexp(-1)
        # Not from the log-sum-exp, whose rounding grows with the logits.
        self.weights = one.logits.softmax(-1)

    @cached_property
    def of_keys(self) -> Float32[Tensor, "heads picks keys"]:
        return self.weights[..., : self.keys]

    @cached_property
    def running(self) -> Float[Tensor, "heads picks sums"]:
        """Sums of the weights of all keys before the first, the second, ..., and of all."""
        exact = torch.float32 if self.weights.device.type == "mps" else torch.float64
        sums = torch.zeros(*self.of_keys.shape[:2], self.keys + 1, dtype=exact, device=self.weights.device)
        torch.cumsum(self.of_keys, -1, dtype=exact, out=sums[..., 1:])
        return sums

    @cached_property
    def out(self) -> Float32[Tensor, "heads picks dim"]:
        """Sums of the values by their weights."""
        heads, picks = self.weights.shape[:2]
        groups = self.of_keys.reshape(self.values.shape[0], -1, self.keys)
        return (groups @ self.values).reshape(heads, picks, -1)

    def entropy(self) -> Tensor:
        return torch.special.entr(self.weights).sum(-1)

    def largest(self) -> tuple[Tensor, Tensor]:
        return self.logits[..., : self.keys].max(-1)

    def itself(self) -> Tensor:
        at = self.positions[None, :, None].expand(self.weights.shape[0], -1, 1)
        return self.of_keys.gather(2, at.long())[..., 0]

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """The largest weights and where they are; -1 where fewer keys have any."""
        weights, places = self.of_keys.topk(min(count, self.keys), dim=-1)
        missing = (0, count - weights.shape[-1])
        places = places.float().masked_fill_(weights == 0, -1)
        return torch.nn.functional.pad(weights, missing), torch.nn.functional.pad(places, missing, value=-1)

    def by_bucket(self, buckets: BucketRuns, count: int) -> Tensor:
        """Weight of the keys in each bucket."""
        sums = self.running.index_select(2, buckets.bounds.clamp(max=self.keys)).diff(dim=-1)
        found = sums.new_zeros(*sums.shape[:2], count)
        return found.index_add_(2, buckets.numbers, sums).float()

    def by_distance(self, count: int) -> Tensor:
        """Weight of the keys by floor(log2(1 + distance)): number i is of distances from 2^i - 1 to 2^(i+1) - 2."""
        powers = 2 ** torch.arange(count + 1, device=self.positions.device)
        # Keys before this one are at least 2^i - 1 away: all but the last 2^i - 1.
        ends = (self.positions[:, None] + 2 - powers).clamp_(0, self.keys)
        sums = self.running.gather(2, ends.expand(self.weights.shape[0], -1, -1))
        return (sums[..., :-1] - sums[..., 1:]).float()


@dataclass(frozen=True)
class BucketRuns:
    """Neighbouring positions of one bucket: where they begin, the end of all, and which bucket it is.

    A bucket may be in several places.
    """

    bounds: Int64[Tensor, " bounds"]
    numbers: Int64[Tensor, " runs"]

    @classmethod
    def of(cls, buckets: Int32[np.ndarray, " positions"], device: torch.device) -> BucketRuns:
        starts = np.flatnonzero(np.diff(buckets, prepend=-1))
        bounds = torch.from_numpy(np.append(starts, len(buckets)))
        return cls(bounds.to(device), torch.from_numpy(buckets[starts].astype(np.int64)).to(device))

    @classmethod
    def of_sections(cls, sections: Sections | None, names: Sequence[str], device: torch.device) -> BucketRuns:
        """Stretches of a document by their place among some names; all others are of one number more."""
        place = {name: number for number, name in enumerate(names)}
        stretches = [] if sections is None else list(zip(sections.codes.tolist(), sections.ends.tolist(), strict=True))
        known = () if sections is None else sections.known
        numbers = [place.get(known[code], len(names)) for code, _ in stretches]
        bounds = torch.tensor([0, *(end for _, end in stretches)], dtype=torch.int64)
        return cls(bounds.to(device), torch.tensor(numbers, dtype=torch.int64).to(device))


class NamedSections:
    """Where the sections of some names lie in each of some texts; found once for each text and device."""

    def __init__(self, names: Sequence[str], texts: Sequence[Sections | None]) -> None:
        self._names, self._texts = names, texts
        self._found: dict[tuple[int, torch.device], BucketRuns] = {}

    def of(self, row: int, device: torch.device) -> BucketRuns | None:
        """None where there are no names."""
        if self._names and (row, device) not in self._found:
            self._found[row, device] = BucketRuns.of_sections(self._texts[row], self._names, device)
        return self._found.get((row, device))


def statistics(
    one: Slice,
    positions: Int[Tensor, " picks"],
    layout: AttentionLayout,
    buckets: BucketRuns,
    sections: BucketRuns | None = None,
) -> Float32[Tensor, "heads picks width"]:
    """What a layout asks of a slice, as its columns side by side.

    Args:
        positions: of the slice's picks.
        buckets: of every position, as the sampler has them.
        sections: of the text's tokens, where the layout has some.
    """
    weights, named = Weights(one, positions), len(layout.sections)
    parts: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "lse": lambda: (weights.lse,),
        "entropy": lambda: (weights.entropy(),),
        "max_logit": weights.largest,
        "first": lambda: (weights.of_keys[..., 0],),
        "self": lambda: (weights.itself(),),
        "sink": lambda: (weights.weights[..., one.keys :].sum(-1),),
        "mass": lambda: (weights.by_bucket(buckets, layout.buckets),),
        "distance": lambda: (weights.by_distance(layout.distances),),
        "section": lambda: (weights.by_bucket(sections or buckets, named + 1)[..., :named],),
        "top": lambda: weights.top(layout.top),
        "out_norm": lambda: (weights.out.norm(dim=-1),),
        "out": lambda: (weights.out,),
    }
    columns = [column for name in layout.statistics for column in parts[name]()]
    return torch.cat([column if column.dim() == 3 else column[..., None].float() for column in columns], 2)
