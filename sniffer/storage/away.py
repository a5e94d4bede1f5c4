"""Parts that are at the copy of a run alone (`output.keep_local=false`): which those are, and what is said of them.

The manifest names the URL. It may be someone else's, so nothing is asked there unless that URL was typed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sniffer.errors import RunError
from sniffer.storage.remote import RemotePath
from sniffer.storage.schema import Part

if TYPE_CHECKING:
    from sniffer.storage.manifest import Manifest


def away(folder: Path, manifest: Manifest) -> list[Part]:
    """The parts, pending ones too, that a folder of this machine does not have, and that are said to be at a URL."""
    if manifest.parts_at is None or isinstance(folder, RemotePath):
        return []
    return [part for part in (*manifest.parts, *manifest.pending) if not (folder / part.path).is_file()]


def told(manifest: Manifest, parts: list[Part]) -> str:
    """Where they are, as the end of a line."""
    return f"{len(parts):,} of its {len(manifest.parts):,} parts are at {manifest.parts_at} alone"


def elsewhere(folder: Path, manifest: Manifest) -> str:
    """What to say after a run's vectors where some are not in its folder."""
    gone = away(folder, manifest)
    return f"; {told(manifest, gone)}" if gone else ""


def require_files(folder: Path, manifest: Manifest, *, all_here: bool = True) -> None:
    """Raises RunError where a file that counts is missing; or is at a URL alone, if they are to be `all_here`."""
    gone = away(folder, manifest)
    if gone and all_here:
        raise RunError(f"{folder} keeps its vectors elsewhere ({told(manifest, gone)}): open that URL in its place")
    for record in manifest.files():
        if record not in gone and not (folder / record.path).is_file():
            raise RunError(
                f"{folder} lacks {record.path}, which its manifest names: restore it, or "
                f"`python -m sniffer.runs resume {folder}` to capture its rows again"
            )
