"""Which files a checkpoint consisted of: digests for the manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

WHOLE_FILE_BYTES = 1 << 30
"""Larger files are recorded by size and by the digest of their first MiB, which lists all tensors."""


def digests(folder: Path, only: str | None = None) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, or of the `only` one it consists of; see WHOLE_FILE_BYTES."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: _digest(path) for path in files if only in (None, path.name)}


def snapshot_commit(folder: Path | None) -> str | None:
    """The commit in a hub cache path (.../snapshots/<commit>)."""
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= WHOLE_FILE_BYTES:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        head = hashlib.sha256(stream.read(1 << 20)).hexdigest()
    return f"{size} bytes, first MiB sha256:{head}"
