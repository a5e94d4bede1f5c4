"""Finding run folders, and telling what state a run is in."""

from __future__ import annotations

import os
from pathlib import Path

from sniffer.lock import is_held
from sniffer.manifest import MANIFEST_PATH, TWIN_PATH, Manifest

DEPTH = 4
"""Folders below the one that is searched: outputs/SWEEP/JOB, and some room."""


def run_folders(place: Path) -> list[Path]:
    """The run folders at or below a folder, in order; jobs of a sweep by number."""
    found = []
    for folder, below, files in os.walk(place):
        if MANIFEST_PATH in files or TWIN_PATH in files:
            found.append(Path(folder))
            below.clear()
        elif len(Path(folder).relative_to(place).parts) >= DEPTH:
            below.clear()
    return sorted(found, key=lambda run: [(not part.isdecimal(), part.zfill(9)) for part in run.parts])


def state(folder: Path, manifest: Manifest) -> str:
    """complete, interrupted, running, or killed: it says running, but no process holds it."""
    if manifest.status == "running" and not is_held(folder):
        return "killed"
    return manifest.status
