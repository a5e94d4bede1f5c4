"""Telling what state a run is in."""

from __future__ import annotations

from pathlib import Path

from sniffer.storage.lock import is_held
from sniffer.storage.manifest import Manifest
from sniffer.storage.remote import RemotePath


def state(folder: Path, manifest: Manifest) -> str:
    """complete, interrupted, running, or killed: it says running, but no process holds it.

    At a URL a run is as it was when it was mirrored.
    """
    if manifest.status == "running" and not isinstance(folder, RemotePath) and not is_held(folder):
        return "killed"
    return manifest.status
