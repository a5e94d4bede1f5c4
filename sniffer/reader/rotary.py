"""A layer's RoPE as something to turn vectors with, held against what was captured before it and after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float64, Int

from sniffer.errors import RunError
from sniffer.types import Rope

if TYPE_CHECKING:
    from sniffer.reader.run import Run

SIDES = (("q", "q_pre"), ("k", "k_pre"))
LOOKED_AT = 1000
"""Rows of a head that are compared."""

ROUNDING = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}
TIMES = 8
"""Of a dtype's rounding that a number may be off, over the largest of its vector; angles are float32 in any model."""


@dataclass(frozen=True)
class Rotary:
    """Turns q_pre and k_pre of a layer to any positions, and q and k back.

    Attributes:
        rope: as the manifest tells it, which start-up has shown to give q of q_pre and k of k_pre.
        proven: the kinds, of q and k, that captured rows have shown to be what it makes of those before RoPE.
    """

    layer: int
    rope: Rope
    proven: tuple[str, ...]

    @property
    def turns(self) -> bool:
        """False in a layer without RoPE, which leaves vectors as they are."""
        return bool(self.rope.inv_freq)

    def turned(
        self, vectors: Float[np.ndarray, "... n dim"], positions: Int[np.ndarray, " n"]
    ) -> Float64[np.ndarray, "... n dim"]:
        """Vectors of q_pre or k_pre as they would be after RoPE at these positions.

        Raises:
            RunError: a position is below 0, or where the model turns by other frequencies.
        """
        return self.rope.turned(vectors, self._checked(positions))

    def before(
        self, vectors: Float[np.ndarray, "... n dim"], positions: Int[np.ndarray, " n"]
    ) -> Float64[np.ndarray, "... n dim"]:
        """Vectors of q or k, which are at these positions, as they were before RoPE; raises as `turned`."""
        return self.rope.before(vectors, self._checked(positions))

    def _checked(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        first, last = int(positions.min(initial=0)), int(positions.max(initial=0))
        if first < 0:
            raise RunError(f"position {first} is none: layer {self.layer} turns positions from 0 on")
        if self.rope.until is not None and last >= self.rope.until:
            raise RunError(
                f"layer {self.layer} turns by other frequencies in texts of more than {self.rope.until:,} tokens, and "
                f"position {last:,} is in none shorter: stay below"
            )
        return positions


def rotary(run: Run, layer: int) -> Rotary:
    """As `Run.rotary`."""
    rope = run.rope(layer)
    captured = run.manifest.selection[layer]
    if rope.until is not None and (longest := int(run.examples()["n_tokens"].max() or 0)) > rope.until:  # type: ignore[arg-type]
        raise RunError(
            f"{run.folder} has a text of {longest:,} tokens, and layer {layer} turns by other frequencies beyond "
            f"{rope.until:,}: capture with dataset.max_tokens={rope.until}"
        )
    proven = [side for side in SIDES if all(kind in captured for kind in side)]
    for after, before in proven:
        heads = sorted({*captured[after]} & {*captured[before]})
        for head in dict.fromkeys([*heads[:1], *heads[-1:]]):
            _prove(run, layer, head, after, before, rope)
    return Rotary(layer, rope, tuple(after for after, _ in proven))


def _prove(run: Run, layer: int, head: int, after: str, before: str, rope: Rope) -> None:
    """Raises RunError where what was captured before RoPE, turned, is not what was captured after it."""
    found, wanted = (run.vectors(layer=layer, head=head, kind=kind) for kind in (before, after))
    where = f"{before} of layer {layer}, head {head} in {run.folder}"
    if not np.array_equal(found.positions, wanted.positions) or not np.array_equal(
        found.example_ids, wanted.example_ids
    ):
        raise RunError(f"{where} has other rows than {after}: `python -m sniffer.runs verify {run.folder}` tells more")
    some = np.unique(np.linspace(0, len(found) - 1, LOOKED_AT).astype(int)) if len(found) else np.empty(0, int)
    # What overflowed says nothing of angles.
    some = some[np.isfinite(found.vectors[some]).all(1) & np.isfinite(wanted.vectors[some]).all(1)]
    at, vectors = wanted.positions[some], wanted.vectors[some].astype(np.float64)
    size = np.maximum(np.abs(vectors).max(axis=1, initial=0, keepdims=True), np.finfo(np.float32).tiny)
    off = (np.abs(rope.turned(found.vectors[some], at) - vectors) / size).max(axis=1, initial=0)
    dtype = str(run.manifest.device.get("dtype"))
    allowed = TIMES * (ROUNDING.get(dtype, ROUNDING["bfloat16"]) + ROUNDING["float32"] * at)
    if not (off <= allowed).all():
        raise RunError(
            f"{where}, turned as the manifest tells, is not {after} (off by {off.max():.1%}): leave the layer "
            "out with layers=..., and please report this"
        )
