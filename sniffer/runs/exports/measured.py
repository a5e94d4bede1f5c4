"""Moments of a whole model: of every layer and every head, or refused with what to capture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.types import KIND, LayerGeometry, Moments


class Measured:
    """What a run has moments of, for a format of some name that is of all layers and heads of a model.

    Raises:
        RunError: it has none of some layer, head or kind, or no covariances; the message says how to capture them.
    """

    def __init__(self, run: Run, name: str, kinds: Sequence[str], *, full: bool) -> None:
        self.run, self.name, self.kinds = run, name, tuple(kinds)
        self.layers: tuple[LayerGeometry, ...] = tuple(sorted(run.manifest.geometry, key=lambda one: one.layer))
        self._require_all(full)

    @property
    def documents(self) -> int:
        return int(self.run.manifest.counts["examples"])

    def of(self, layer: int, kind: str) -> list[Moments]:
        """Of each head of one layer and kind.

        Raises:
            RunError: a number among them is not finite.
        """
        found = [self.run.moments(layer=layer, head=head, kind=kind) for head in self.run.counted_heads(layer, kind)]
        for head, one in enumerate(found):
            if not np.isfinite(one.minimum).all() or not np.isfinite(one.maximum).all():
                raise RunError(
                    f"layer {layer}, head {head} of {kind} has values that are not finite: {self.name} is none"
                )
        return found

    def same(self, of: str, kind: str) -> int:
        """How many heads, or dimensions, all layers have: one tensor holds them all.

        Raises:
            RunError: layers differ.
        """
        found = {int(getattr(layer, of)[kind]) for layer in self.layers}
        if len(found) > 1:
            told = "numbers of heads" if of == "heads" else "vector lengths"
            raise RunError(f"layers have {told} {sorted(found)} of {kind}: {self.name} holds all layers in one tensor")
        return found.pop()

    def require_numbered(self) -> None:
        """Every layer of the model attends: those who load it count layers of the model.

        Raises:
            RunError: some do not.
        """
        numbers = [layer.layer for layer in self.layers]
        if numbers != list(range(len(numbers))):
            raise RunError(
                f"only layers {numbers} of the model have attention: {self.name} is of models where all have"
            )

    def _require_all(self, full: bool) -> None:
        words = [f"capture.moments.kinds=[{','.join(self.kinds)}]", *["capture.moments.second=full"] * full]
        way = f"capture with {' '.join(words)}, all layers and heads (sampler.base_rate=0 for no vectors)"
        layout, run = self.run.manifest.moments_layout, self.run
        if layout is None:
            raise RunError(f"{run.folder} has no moments, of which {self.name} is made: {way}")
        if missing := [kind for kind in self.kinds if kind not in layout.kinds]:
            raise RunError(f"{self.name} needs moments of {', '.join(missing)}, which this run has not: {way}")
        if full and layout.second != "full":
            raise RunError(f"{self.name} needs covariances, and this run has second={layout.second}: {way}")
        if not self.documents:
            raise RunError(f"{run.folder} has no documents: there are no moments")
        for layer in self.layers:
            for kind in self.kinds:
                self._require_heads(layer, kind, way)

    def _require_heads(self, layer: LayerGeometry, kind: str, way: str) -> None:
        heads = self.run.counted_heads(layer.layer, kind) if layer.layer in self.run.layers else ()
        if missing := sorted(set(range(layer.heads[kind])) - set(heads)):
            side = "query" if KIND[kind].draw == "q" else "key"
            raise RunError(
                f"{self.name} needs all heads of all layers, and {side} head {missing[0]} of layer {layer.layer} has "
                f"no moments of {kind} ({len(missing)} of {layer.heads[kind]} there): {way}"
            )
