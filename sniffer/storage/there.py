"""What the copy of a run has of the parts that its folder lacks, for a session that goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from sniffer.errors import RunError
from sniffer.storage.away import away, told
from sniffer.storage.documents import examples_by_pair
from sniffer.storage.manifest import Manifest
from sniffer.storage.remote import RemotePath, named
from sniffer.storage.schema import Part


@dataclass(frozen=True)
class There:
    """Of the parts that a folder lacks, the paths of those that its copy has."""

    copy: Path | None = None
    paths: frozenset[str] = frozenset()

    def examples_by_pair(self, folder: Path, parts: Iterable[Part]) -> dict[tuple[int, str], frozenset[int]]:
        """As `documents.examples_by_pair`, each part read where it is."""
        parts = list(parts)
        found = examples_by_pair(folder, (part for part in parts if part.path not in self.paths))
        if self.copy is not None:
            far = examples_by_pair(self.copy, (part for part in parts if part.path in self.paths))
            found |= {pair: ids | found.get(pair, frozenset()) for pair, ids in far.items()}
        return found


NOTHING = There()


def find(folder: Path, manifest: Manifest, url: str | None) -> There:
    """Looks at the copy that someone has typed the URL of for the parts that a folder lacks.

    A part is there where the manifest of the copy names it, which is written after it was proven, and its size is
    right. What the named copy has lost is not found, and so is captured again.

    Args:
        url: None where none was typed.

    Raises:
        RunError: parts are elsewhere, and no URL was typed, it cannot be read, or it is another place that lacks some.
    """
    gone = away(folder, manifest)
    if not gone:
        return NOTHING
    if url is None:
        raise RunError(
            f"{folder} goes on with its copy alone, since {told(manifest, gone)}: add --mirror "
            f"{quote(str(manifest.parts_at))} if you trust it"
        )
    place = named(url)
    if not isinstance(place, RemotePath):
        raise RunError(f"{url} is no URL: {told(manifest, gone)}")
    copy = place.listed()
    theirs = Manifest.load(copy, parts_must_exist=False)
    if theirs.created != manifest.created:
        raise RunError(f"{copy} holds another run, which was begun at {theirs.created}: {told(manifest, gone)}")
    known = {part.path: part for part in (*theirs.parts, *theirs.pending)}
    there = frozenset(part.path for part in gone if _is_there(copy, part, known.get(part.path)))
    lost = [part.path for part in gone if part.path not in there]
    if lost and str(copy) != manifest.parts_at:
        raise RunError(f"{copy} lacks {lost[0]}, and {told(manifest, gone)}: give that URL, or copy it there first")
    return There(copy, there)


def _is_there(copy: RemotePath, part: Part, known: Part | None) -> bool:
    path = copy / part.path
    return known is not None and known.sha256 == part.sha256 and path.is_file() and path.stat().st_size == part.bytes
