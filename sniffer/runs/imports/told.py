"""What an imported run cannot be asked for, and what of it can be checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sniffer.errors import RunError
from sniffer.sampler import FORMULAS
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import Example
from sniffer.types import Rows


def refuse_imported(folder: Path, manifest: Manifest, verb: str) -> None:
    """Raises RunError where a run has no configuration, since it was imported, or captured in a notebook."""
    if manifest.imported or manifest.of_notebook:
        how = "imported" if manifest.imported else "captured in a notebook"
        raise RunError(f"{folder} was {how} and has no configuration to run: it cannot be {verb}; capture it anew")


def unchecked(manifest: Manifest) -> Iterator[str]:
    """What nobody can check of an imported run."""
    if manifest.imported:
        told = str(manifest.sampler.get("_target_")) in FORMULAS
        law = "whether the draws were its sampler's" if told else "its sampler, which nobody has told"
        yield f"imported: not to be checked are {law}, token ids, where documents end, and what was captured"


def check_places(examples: Mapping[int, Example], layer: int, kind: str, found: Rows) -> Iterator[str]:
    """What is wrong with where rows of an imported run are from, one line each."""
    where = f"layer {layer}, kind {kind}"
    unknown = sorted(set(found.example_id.tolist()) - examples.keys())
    if unknown:
        yield f"{where}: rows of document {unknown[0]}, which examples.parquet does not list ({len(unknown)} such)"
        return
    if (found.position >= np.array([examples[number].n_tokens for number in found.example_id.tolist()])).any():
        yield f"{where}: positions beyond the end of their document"
    places = np.unique(found.position)
    if len(places) != len(np.unique(np.stack([found.position, found.bucket]), axis=1).T):
        yield f"{where}: some position is in two buckets"
    if len(np.unique(np.stack([found.example_id, found.position.astype(np.int64)]), axis=1).T) != len(found):
        yield f"{where}: some positions are there twice"
