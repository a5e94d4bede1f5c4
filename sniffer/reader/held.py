"""What a run folder holds, by its manifest: layers, kinds and heads, and with which probability rows were kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from sniffer.errors import RunError, first_line
from sniffer.reader.laws import ranges
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.model_config import read_model_config
from sniffer.storage.untrusted import read_yaml
from sniffer.types import ALL_KINDS, KIND, ROPE_LAYOUTS, Rope


class Held:
    """A run folder, of which the manifest alone is looked at."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.manifest.status}, {self.manifest.rows:,} rows)"

    @property
    def complete(self) -> bool:
        """False while the run goes on and after an interruption: what is there is right, but not all."""
        return self.manifest.status == "complete"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration that made the run."""
        path = self.folder / RunFolder.CONFIG
        try:
            return dict(read_yaml(path))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise RunError(f"could not read {path}: {first_line(error)}; restore the file, or capture again") from error

    @cached_property
    def model_config(self) -> dict[str, Any]:
        """The config of the model that ran, as its class resolved it.

        Raises:
            RunError: an early release captured the run, or the file is damaged.
        """
        return read_model_config(self.folder, self.manifest)

    def rope(self, layer: int) -> Rope:
        """How a captured layer turns q and k by position.

        Raises:
            RunError: the layer was not captured, or its RoPE is not known, and why.
        """
        self._check("layer", layer, self.layers, "this run")
        told = next((one for one in self.manifest.rope if layer in one["layers"]), None)
        if told is None and self.manifest.imported:
            raise RunError(f"{self.folder} was imported from files that do not tell of RoPE: capture it anew")
        if told is None:
            raise RunError(f"{self.folder} was captured by a release that did not tell of RoPE: capture it anew")
        rope = Rope.from_json(told)
        if rope.missing:
            raise RunError(f"how layer {layer} turns q and k by position is not known: {rope.missing}")
        if rope.layout not in ROPE_LAYOUTS or rope.first + rope.rotary > self._dim(layer, "q"):
            raise RunError(
                f"{self.folder} tells of {rope.rotary} dimensions from {rope.first} on, {rope.layout:.40}, in layer "
                f"{layer}, which this release cannot turn: install a newer qk-sniffer, or capture it anew"
            )
        return rope

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.manifest.selection)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of vectors."""
        return tuple(kind for kind in self._all_kinds if not KIND[kind].statistics)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Of attention: which `attention` and `scan(kind="attention")` have; () for none."""
        layout = self.manifest.layout
        return () if layout is None else layout.statistics

    @property
    def branches(self) -> int:
        """Documents with rows from where they part from another one alone, as beams do (`first_position`)."""
        told = self.manifest.dataset.get("branches", 0)
        return told if isinstance(told, int) else 0

    @property
    def _all_kinds(self) -> tuple[str, ...]:
        captured = {kind for kinds in self.manifest.selection.values() for kind in kinds}
        return tuple(kind for kind in ALL_KINDS if kind in captured)

    @property
    def all_captured(self) -> set[tuple[int, str]]:
        """Every captured (layer, kind), statistics of attention among them."""
        return self.captured(kinds=self._all_kinds)

    def heads(self, layer: int, kind: str) -> tuple[int, ...]:
        """The captured heads of one layer and kind.

        Raises:
            RunError: the layer or the kind was not captured; the message says which were.
        """
        self._check("layer", layer, self.layers, "this run")
        self._check("kind", kind, tuple(self.manifest.selection[layer]), f"layer {layer}")
        return self.manifest.selection[layer][kind]

    def counted_heads(self, layer: int, kind: str) -> tuple[int, ...]:
        """The heads of one layer and kind that the run has moments of.

        Raises:
            RunError: it has none of that layer or kind; the message says of which it has.
        """
        layout = self.manifest.moments_layout
        if layout is None:
            raise RunError(f"{self.folder} has no moments: capture with capture.moments.kinds=[{kind}]")
        self._check("layer", layer, self.layers, "this run")
        self._check("kind", kind, layout.kinds, "of moments this run")
        assert self.manifest.moments is not None
        return tuple(self.manifest.moments["heads"][str(layer)][kind])

    def captured(self, layers: Iterable[int] | None = None, kinds: Iterable[str] | None = None) -> set[tuple[int, str]]:
        """The captured (layer, kind) pairs among those wanted; None wants all.

        Raises:
            RunError: a layer or kind was not captured at all.
        """
        layers = self.layers if layers is None else tuple(layers)
        kinds = self.kinds if kinds is None else tuple(kinds)
        for layer in layers:
            self._check("layer", layer, self.layers, "this run")
        for kind in kinds:
            self._check("kind", kind, self._all_kinds, "this run")
        return {(layer, kind) for layer in layers for kind in kinds if kind in self.manifest.selection[layer]}

    def _dim(self, layer: int, kind: str) -> int:
        return self.manifest.layer(layer).dims[kind]

    def _check(self, what: str, value: Any, known: Sequence[Any], where: str) -> None:
        if value not in known:
            raise RunError(f"{what} {value} was not captured: {where} has {what}s {ranges(known)}")
