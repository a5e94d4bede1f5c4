"""`runs export RUN --layout NAME`: by its name, the format that a method loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.runs.export import unfinished
from sniffer.runs.exports import kv_scales, kvpress, qfilters, tensors, triattention
from sniffer.storage.manifest import Manifest

FORMATS: dict[str, Callable[[Run, Path], list[str]]] = {
    "kvpress": kvpress.write,
    "qfilters": qfilters.write,
    "triattention": triattention.write,
    "kv_scales": kv_scales.write,
    "safetensors": tensors.write,
}


def export_moments(folder: Path, target: Path, name: str) -> list[str]:
    """Writes moments of a run into a new folder, which appears when it is complete; returns what to tell of it.

    Raises:
        RunError: the target exists, or the run has not what the format needs.
        OSError: it cannot be written; nothing is left of it.
    """
    if target.exists():
        raise RunError(f"{target} exists already: choose another folder with --to")
    run = Run(folder, Manifest.load(folder))
    with unfinished(target) as place:
        told = FORMATS[name](run, place)
    return told if run.complete else [*told, f"{folder} is {run.manifest.status}: these are of what it has so far"]
