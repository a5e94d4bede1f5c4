"""Which row groups have the rows that are wanted, and which of these rows a rank has in an epoch.

All ranks draw the same order of the row groups; each takes a stretch of it, so that two ranks share at most the row
group between their stretches, of which each has its own rows. Beside the footers, nothing is read, but for row groups
of which the footer does not say that all of their rows are wanted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64, UInt64

from sniffer.errors import RunError, unbroken
from sniffer.reader.held import Held
from sniffer.reader.laws import law_of
from sniffer.reader.scan import Contents, Span, contents_of, part_file, require_part
from sniffer.storage.schema import Part
from sniffer.types import SECTION


@dataclass(frozen=True)
class File:
    """A part with rows that are wanted.

    Attributes:
        folder, name: the run's, and where in it the part lies.
        n_bytes: that it had when it was looked at.
        heads, sections: those wanted; None for all sections, `has_sections` says whether there are any.
        law, kept: the keep probability of each bucket, and the sections that were kept whole.
    """

    folder: Path
    name: str
    n_bytes: int
    contents: Contents
    heads: tuple[int, ...]
    has_sections: bool
    sections: tuple[str, ...] | None
    law: Mapping[int, float]
    kept: Sequence[str]

    def read(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """These columns of some row groups, one below the other, and where there are some, section.

        Raises:
            RunError: the file is missing, damaged, or another than it was.
        """
        columns = [*columns, *([SECTION] if self.has_sections else [])]
        path = self.folder / self.name
        try:
            if path.stat().st_size != self.n_bytes:
                raise pa.ArrowInvalid("it is another file than it was when the batches began")
            with part_file(path, self.has_sections, self.contents.metadata) as file:
                return file.read_row_groups(groups, columns=columns, use_threads=False)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise unreadable(self.folder, self.name, error) from error

    def wanted(self, table: pa.Table) -> Bool[np.ndarray, " rows"]:
        """Which rows of what was read are."""
        found = np.isin(table["head"].to_numpy(), self.heads)
        if self.sections is not None:
            place = table[SECTION].combine_chunks()
            known = np.isin(np.array(place.dictionary.to_pylist(), dtype=object), self.sections)
            found &= known[place.indices.to_numpy()]
        return found

    def head(self, group: int) -> int | None:
        """That of all rows of a row group, as its statistics say; None where they do not."""
        first, last = self.contents.spans[group]["head"]
        return int(first) if first == last else None

    def surely(self, group: int) -> bool | None:
        """Whether all rows of a row group are wanted, or none, as its statistics say; None where they do not."""
        spans = self.contents.spans[group]
        limits: list[tuple[Span, tuple[Any, ...]]] = [(spans["head"], self.heads)]
        if self.sections is not None:
            limits.append((spans[SECTION], self.sections))
        if any(not any(first <= value <= last for value in values) for (first, last), values in limits):
            return False
        return True if all(first == last for (first, last), _ in limits) else None


def unreadable(folder: Path, name: str, error: Exception) -> RunError:
    return RunError(
        f"could not read {folder / name} ({unbroken(error)}): `python -m sniffer.runs verify {folder}` tells more"
    )


@dataclass(frozen=True)
class Slice:
    """Wanted rows of one row group, from `first` to before `last`, counted among those wanted there."""

    file: int
    group: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def cut(self, first: int, last: int) -> Slice:
        """What of it lies in a stretch, counted from its own first row."""
        return Slice(self.file, self.group, self.first + max(0, first), self.first + min(len(self), last))


@dataclass(frozen=True)
class Wanted:
    """All rows that are wanted of a layer and kind: the parts, and their row groups in the order of the files."""

    files: tuple[File, ...]
    groups: tuple[Slice, ...]
    dim: int

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    @property
    def largest(self) -> int:
        """Rows of the largest row group, wanted or not."""
        return max(self.files[one.file].contents.rows[one.group] for one in self.groups)

    def share(self, shuffle: int | None, epoch: int, rank: int, world: int) -> list[Slice]:
        """The rows that a rank has in an epoch, row groups in a drawn order; ranks differ by one row at most."""
        order = range(len(self.groups)) if shuffle is None else drawn(len(self.groups), shuffle, epoch).tolist()
        first, last = (len(self) * end // world for end in (rank, rank + 1))
        return list(stretch((self.groups[number] for number in order), first, last))


def stretch(slices: Iterator[Slice] | Sequence[Slice], first: int, last: int) -> Iterator[Slice]:
    """Those rows of some slices that lie between two places, counted over all of them."""
    place = 0
    for one in slices:
        if place < last and first < place + len(one):
            yield one.cut(first - place, last - place)
        place += len(one)


def drawn(n: int, *seeds: int) -> Int64[np.ndarray, " n"]:
    """A random order of so many things. The bits of PCG64 and SeedSequence are those of every release of NumPy."""
    keys: UInt64[np.ndarray, " n"] = np.random.PCG64(seeds).random_raw(n)
    return np.argsort(keys)


def wanted_of(
    runs: Sequence[tuple[Held, Collection[str] | None]], layer: int, kind: str, heads: Sequence[int]
) -> Wanted:
    """The rows of some runs; each with the sections wanted, None for all.

    Raises:
        RunError: a part is missing or damaged, or vectors have other lengths in one run than in another.
    """
    files: list[File] = []
    groups: list[Slice] = []
    dims = {run.manifest.layer(layer).dims[kind] for run, _ in runs}
    if len(dims) > 1:
        raise RunError(f"layer {layer}, kind {kind} has vectors of {sorted(dims)} numbers, by job: open one of them")
    [dim] = dims
    for run, sections in runs:
        for part in run.manifest.parts_of(layer, kind):
            if not part.rows:
                continue
            file = _file(run, part, kind, dim, tuple(heads), None if sections is None else tuple(sections))
            groups += _groups(file, len(files))
            files.append(file)
    return Wanted(tuple(files), tuple(groups), dim)


def digest_of(runs: Sequence[tuple[Held, Collection[str] | None]], layer: int, kind: str) -> str:
    """Stands for the files that have these rows, in their order."""
    known = hashlib.sha256()
    for run, sections in runs:
        for part in run.manifest.parts_of(layer, kind):
            known.update(f"{part.sha256} {part.rows}\n".encode())
        known.update(repr(None if sections is None else sorted(sections)).encode())
    return known.hexdigest()[:32]


def _file(run: Held, part: Part, kind: str, dim: int, heads: tuple[int, ...], sections: tuple[str, ...] | None) -> File:
    law, kept = law_of(run.folder, run.manifest, kind), run.manifest.kept_sections(kind)
    has_sections, path = run.manifest.has_sections, run.folder / part.path
    try:
        n_bytes = path.stat().st_size
        with part_file(path, has_sections) as file:
            contents = contents_of(file)
        require_part(contents, n_bytes, dim, part.rows)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise unreadable(run.folder, part.path, error) from error
    return File(run.folder, part.path, n_bytes, contents, heads, has_sections, sections, law, kept)


def _groups(file: File, number: int) -> Iterator[Slice]:
    for group, rows in enumerate(file.contents.rows):
        sure = file.surely(group)
        found = rows if sure else 0
        if sure is None:
            found = int(np.count_nonzero(file.wanted(file.read([group], ["head"]))))
        if found:
            yield Slice(number, group, 0, found)


def unknown_law(wanted: Wanted) -> bool:
    """Whether rows have been imported, and nobody has told with which probability they were kept."""
    return any(math.isnan(value) for file in wanted.files for value in file.law.values())
