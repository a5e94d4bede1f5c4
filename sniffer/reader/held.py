"""What a run folder holds, by its manifest: layers, kinds and heads, and with which probability rows were kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float64

from sniffer.errors import RunError, first_line
from sniffer.reader.vectors import probabilities
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.untrusted import read_yaml
from sniffer.types import ALL_KINDS, KIND, Rows


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

    def _probabilities(self, rows: Rows) -> Float64[np.ndarray, " n"]:
        """With which each row was kept."""
        if unknown := set(np.unique(rows.bucket).tolist()) - self._probability_by_bucket.keys():
            raise RunError(
                f"{self.folder} has rows of buckets {_ranges(unknown)}, which its manifest does not know: "
                f"`python -m sniffer.runs verify {self.folder}` tells more"
            )
        return probabilities(self._probability_by_bucket, rows.bucket)

    @cached_property
    def _probability_by_bucket(self) -> dict[int, float]:
        law = self.manifest.probability_by_bucket
        unknown = self.manifest.rows_by_bucket.keys() - law.keys()
        if unknown:
            raise RunError(
                f"{self.folder / RunFolder.MANIFEST} is broken: it gives no probability for buckets "
                f"{_ranges(unknown)}; restore the file, or capture again"
            )
        return law

    def _dim(self, layer: int, kind: str) -> int:
        return self.manifest.layer(layer).dims[kind]

    def _check(self, what: str, value: Any, known: Sequence[Any], where: str) -> None:
        if value not in known:
            raise RunError(f"{what} {value} was not captured: {where} has {what}s {_ranges(known)}")


def _ranges(values: Iterable[Any]) -> str:
    """Names values briefly: 0-29, 31."""
    values = list(values)
    if not all(isinstance(value, int) for value in values):
        return ", ".join(map(str, values))
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
