"""Whether the files of a run folder are those that its manifest names, byte for byte, and what else lies there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from sniffer.errors import RunError
from sniffer.storage.durable import final_name
from sniffer.storage.lock import LOCK_PATH
from sniffer.storage.manifest import Manifest
from sniffer.storage.manifest_file import MANIFEST_PATH, TWIN_PATH
from sniffer.storage.ownership import REPRODUCES_PATH
from sniffer.storage.schema import EXAMPLES_PATH, EXAMPLES_TWIN_PATH, FileRecord

OWN = (
    MANIFEST_PATH,
    TWIN_PATH,
    LOCK_PATH,
    EXAMPLES_PATH,
    EXAMPLES_TWIN_PATH,
    "config.yaml",
    "rerun.yaml",
    "sniffer.log",
    REPRODUCES_PATH,
    "README.md",  # of a published run, as is the next
    ".gitattributes",
)
REPLACED = (MANIFEST_PATH, TWIN_PATH, EXAMPLES_PATH, EXAMPLES_TWIN_PATH, "config.yaml", "rerun.yaml")
"""Those that are written under another name and then take that of the last one."""
OWN_FOLDERS = (".hydra/", "experiments/")
"""Hydra's record of the job, and the results of analyses."""
PART = re.compile(r"captures/layer=[0-9]+/kind=\w+/part-[0-9]+\.parquet")
"""Whose leftovers are removed; whatever else lies in the folder is left alone."""


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
    return [path for path in _unnamed(folder, manifest) if PART.fullmatch(path) or _was_begun(path)]


def foreign(folder: Path, manifest: Manifest) -> list[str]:
    """Files that no run of ours puts into its folder."""
    known = {*(name for name in OWN if (folder / name).is_file()), *leftovers(folder, manifest)}
    return [path for path in _unnamed(folder, manifest) if path not in known and not path.startswith(OWN_FOLDERS)]


def refuse_links(folder: Path) -> None:
    """Keeps whoever writes into a run folder from writing elsewhere, or waiting for someone to read what it writes.

    Raises:
        RunError: a link in the folder leads out of it, or one of a run's files is none.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{path} is a link that leaves the run folder: put what it stands for in its place")
    for name in OWN:
        if (folder / name).exists() and not (folder / name).is_file():
            raise RunError(f"{folder / name} is no plain file: remove it")


def _was_begun(path: str) -> bool:
    """Whether a name is that under which a run writes one of its files until it is complete."""
    place, slash, name = path.rpartition("/")
    final = final_name(name)
    return final is not None and (PART.fullmatch(f"{place}/{final}") is not None if slash else final in REPLACED)


def _unnamed(folder: Path, manifest: Manifest) -> Iterator[str]:
    named = {record.path for record in (*manifest.files(), *manifest.pending)}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if (file.is_symlink() or not file.is_dir()) and path not in named:
            yield path
