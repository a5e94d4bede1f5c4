"""RoPE as one layer applies it: which dimensions turn, how fast, and how their lengths change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Complex128, Float, Float64, Int

ROPE_LAYOUTS = ("half", "interleaved", "interleaved_to_half")
"""How dimensions are paired: i with i + pairs (Llama and most others), 2i with 2i + 1, or so before RoPE and, after it,
put as i and i + pairs (DeepSeek-V3 and kin)."""


@dataclass(frozen=True)
class Rope:
    """How a layer turns q and k by position, with the frequencies that the model computes with (models/rope.py).

        pair f of dimensions, read as a complex number, at position p:
        z[f] becomes attention_factor * z[f] * exp(i * inv_freq[f] * p)

    Attributes:
        inv_freq: radians per position, a number for each pair; none where the layer does not turn anything.
        layout: how dimensions are paired, of ROPE_LAYOUTS.
        first: the first dimension that turns; the pairs' dimensions follow it, others stay as they are.
        attention_factor: what the turned dimensions are multiplied by (`attention_scaling` in transformers).
        parameters: what the model's config says of it as resolved, such as rope_type, rope_theta and factor.
        layer_type: where these differ by type of layer, which one.
        until: it holds in texts of so many tokens at most; None in all. Longer ones turn by other frequencies.
        missing: why it is not known; empty where it is, and was shown to give q of q_pre and k of k_pre.
    """

    inv_freq: tuple[float, ...] = ()
    layout: str = ROPE_LAYOUTS[0]
    first: int = 0
    attention_factor: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    layer_type: str | None = None
    until: int | None = None
    missing: str = ""

    @property
    def rotary(self) -> int:
        """How many dimensions turn."""
        return 2 * len(self.inv_freq)

    def turned(
        self, vectors: Float[np.ndarray, "... n dim"], positions: Int[np.ndarray, " n"]
    ) -> Float64[np.ndarray, "... n dim"]:
        """Vectors before RoPE as they are after it, in float64."""
        return self.at(positions)(vectors)

    def before(
        self, vectors: Float[np.ndarray, "... n dim"], positions: Int[np.ndarray, " n"]
    ) -> Float64[np.ndarray, "... n dim"]:
        """Vectors after RoPE as they were before it, in float64: `turned` the other way round."""
        angles, factor = -positions[:, None] * np.array(self.inv_freq), 1 / self.attention_factor
        places = self.places(pre=False), self.places(pre=True)
        return self._turned(factor * np.cos(angles), factor * np.sin(angles), vectors, places)

    def planes(self, vectors: Float[np.ndarray, "... n dim"]) -> Complex128[np.ndarray, "... n planes"]:
        """Vectors before RoPE as a complex number for each pair, and one for each dimension that does not turn.

        With speeds w, `self.speeds(dim)`, the product of a query and a key d positions before it is the real part of
        the sum of conj(q) k exp(-i w d), the attention factor included.
        """
        x, y = (vectors[..., place].astype(np.float64) for place in self.places(pre=True))
        still = np.ones(vectors.shape[-1], dtype=bool)
        still[self.first : self.first + self.rotary] = False
        return np.concatenate([self.attention_factor * (x + 1j * y), vectors[..., still]], axis=-1)

    def speeds(self, dim: int) -> Float64[np.ndarray, " planes"]:
        """Of `planes`, in radians per position, of vectors of so many dimensions; 0 for those that do not turn."""
        return np.concatenate([np.array(self.inv_freq, dtype=np.float64), np.zeros(dim - self.rotary)])

    def at(self, positions: Int[np.ndarray, " n"]) -> Callable[[np.ndarray], np.ndarray]:
        """What `turned` does with vectors at these positions, for several that share them."""
        angles, places = positions[:, None] * np.array(self.inv_freq), (self.places(pre=True), self.places(pre=False))
        cos, sin = self.attention_factor * np.cos(angles), self.attention_factor * np.sin(angles)
        return partial(self._turned, cos, sin, places=places)

    @staticmethod
    def _turned(cos: np.ndarray, sin: np.ndarray, vectors: np.ndarray, places: Any) -> np.ndarray:
        """By these angles, from pairs of dimensions at the first places to those at the second."""
        found = vectors.astype(np.float64)
        before, after = places
        x, y = (vectors[..., place].astype(np.float64) for place in before)
        found[..., after[0]] = x * cos - y * sin
        x *= sin
        y *= cos
        found[..., after[1]] = np.add(x, y, out=x)
        return found

    def places(self, *, pre: bool) -> tuple[slice, slice]:
        """The first and the second dimension of each pair, before RoPE or after it."""
        begin, end = self.first, self.first + self.rotary
        if self.layout == "half" or (self.layout == "interleaved_to_half" and not pre):
            return slice(begin, begin + len(self.inv_freq)), slice(begin + len(self.inv_freq), end)
        return slice(begin, end, 2), slice(begin + 1, end, 2)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "inv_freq": list(self.inv_freq)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Rope:
        """Keys that a later release added are left out."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**known | {"inv_freq": tuple(known.get("inv_freq", ()))})


def by_rope(ropes: Mapping[int, Rope]) -> tuple[Mapping[str, Any], ...]:
    """As plain values, an entry for all layers that have the same."""
    found: dict[str, dict[str, Any]] = {}
    for layer, rope in ropes.items():
        found.setdefault(repr(rope), {"layers": [], **rope.as_json()})["layers"].append(layer)
    return tuple(found.values())
