"""`runs mirror RUN URL`: a copy of a run at a URL, made or caught up; what is there already is not sent again."""

from __future__ import annotations

from pathlib import Path

from sniffer.storage.following import bring
from sniffer.storage.integrity import refuse_links
from sniffer.storage.layout import RunFolder
from sniffer.storage.lock import hold
from sniffer.storage.manifest import Manifest
from sniffer.storage.mirror import Mirror
from sniffer.storage.urls import require_url
from sniffer.terminal.progress import waiting_for
from sniffer.words import size


def mirror(folder: Path, url: str) -> str:
    """Brings the copy of a run to what the run is now; returns what to tell.

    Raises:
        RunError: the URL is of no folder, holds something else or cannot be reached; the run is being written to, or is
            damaged.
    """
    manifest = Manifest.load(folder, parts_must_exist=False)
    require_url(url, "")
    refuse_links(folder)
    with hold(folder):
        return brought(folder, manifest, url)


def brought(folder: Path, manifest: Manifest, url: str) -> str:
    """As `mirror`, of a run that the caller holds."""
    # What a run was begun to let go of goes as it would have; to any other place it is only copied.
    copy = Mirror(folder, url, keep=manifest.parts_at != require_url(url, ""))
    with waiting_for(f"copying to {copy.url}"):
        bring(copy, manifest, (folder / RunFolder.MANIFEST).read_bytes())
    sent = f"{copy.files:,} files sent, {size(copy.bytes)}" if copy.files else "nothing had to be sent"
    state = "" if manifest.status == "complete" else f" as far as it goes ({manifest.status})"
    gone = f", and {copy.removed:,} parts removed here (output.keep_local=false)" if copy.removed else ""
    return f"{copy.url} has all of {folder}{state}: {sent}{gone}"
