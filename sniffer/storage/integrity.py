"""Whether the files of a run folder are those that its manifest names, byte for byte, and what else lies there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from sniffer.errors import RunError
from sniffer.storage.durable import final_name
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import FileRecord

OWN_FOLDERS = (".hydra/", "experiments/")
"""Hydra's record of the job, and the results of analyses."""


def damage(folder: Path, record: FileRecord) -> str | None:
    """What is wrong with a file that counts, in a few words; None if it is whole.

    It is read once; its size tells first.
    """
    path = folder / record.path
    try:
        if not path.is_file():
            return "is missing"
        found = path.stat().st_size
        if found != record.bytes:
            return f"has {found:,} bytes instead of {record.bytes:,}"
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == record.sha256 else "has changed (its SHA-256 is not the one it was written with)"


def leftovers(folder: Path, manifest: Manifest) -> list[str]:
    """Files that a killed run began, or wrote and did not commit; a resume removes them."""
    return [path for path in _unnamed(folder, manifest) if RunFolder.is_numbered_file(path) or _was_begun(path)]


def foreign(folder: Path, manifest: Manifest) -> list[str]:
    """Files that no run of ours puts into its folder."""
    known = {*(name for name in RunFolder.FILES if (folder / name).is_file()), *leftovers(folder, manifest)}
    return [path for path in _unnamed(folder, manifest) if path not in known and not path.startswith(OWN_FOLDERS)]


def refuse_links(folder: Path) -> None:
    """Keeps whoever writes into a run folder from writing elsewhere, or waiting for someone to read what it writes.

    Raises:
        RunError: a link in the folder leads out of it, or one of a run's files is none.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{path} is a link that leaves the run folder: put what it stands for in its place")
    for name in RunFolder.FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            raise RunError(f"{folder / name} is no plain file: remove it")


def _was_begun(path: str) -> bool:
    """Whether a name is that under which a run writes one of its files until it is complete."""
    place, slash, name = path.rpartition("/")
    final = final_name(name)
    return final is not None and (
        RunFolder.is_numbered_file(f"{place}/{final}") if slash else final in RunFolder.REPLACED
    )


def _unnamed(folder: Path, manifest: Manifest) -> Iterator[str]:
    named = {record.path for record in (*manifest.files(), *manifest.pending)}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if (file.is_symlink() or not file.is_dir()) and path not in named:
            yield path
