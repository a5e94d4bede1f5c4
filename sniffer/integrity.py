"""Whether the files of a run folder are those that its manifest names, byte for byte, and what else lies there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from sniffer.errors import RunError
from sniffer.job_folders import REPRODUCES_PATH
from sniffer.lock import LOCK_PATH
from sniffer.manifest import MANIFEST_PATH, TWIN_PATH, Manifest
from sniffer.schema import EXAMPLES_PATH, EXAMPLES_TWIN_PATH, FileRecord

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
OWN_FOLDERS = (".hydra/", "experiments/")
"""Hydra's record of the job, and the results of analyses."""
PART = re.compile(r"captures/layer=\d+/kind=\w+/part-\d+\.parquet")
TEMPORARY = re.compile(r"(.*/)?\.[^/]+\.\d+\.tmp")


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
    return [path for path in _unnamed(folder, manifest) if PART.fullmatch(path) or TEMPORARY.fullmatch(path)]


def foreign(folder: Path, manifest: Manifest) -> list[str]:
    """Files that no run of ours puts into its folder."""
    known = {*OWN, *leftovers(folder, manifest)}
    return [path for path in _unnamed(folder, manifest) if path not in known and not path.startswith(OWN_FOLDERS)]


def refuse_links(folder: Path) -> None:
    """Keeps whoever writes into a run folder from writing elsewhere.

    Raises:
        RunError: a link in the folder leads out of it.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{path} is a link that leaves the run folder: put what it stands for in its place")


def _unnamed(folder: Path, manifest: Manifest) -> Iterator[str]:
    named = {record.path for record in (*manifest.files(), *manifest.pending)}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if (file.is_symlink() or not file.is_dir()) and path not in named:
            yield path
