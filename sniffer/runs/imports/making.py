"""A run made of files of heads; where heads have positions of their own, a folder of runs, one for each query head.

All heads of a layer and kind of a run were kept at the same positions, which analyses count on. The sampler of
github.com/viktor-shcherb/qk-sniffer draws for each head anew; then head-07 is the run with query head 7 of every layer
and the key heads that it attends with, and key-head-03 one of a key head that no query head there attends with.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rich
from rich.progress import track

from sniffer.errors import RunError
from sniffer.process.environment import now
from sniffer.reader.scan import require_room
from sniffer.runs.export import unfinished
from sniffer.runs.imports.census import Census
from sniffer.runs.imports.heads import HeadFile, head_files, read_rows, read_vectors
from sniffer.runs.imports.law import check_law
from sniffer.sampler import Picker, Sampler
from sniffer.storage.law import fields_of, with_law
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import Footer, Part
from sniffer.storage.writer import Listing, write_vectors
from sniffer.types import KIND, KINDS, LayerGeometry, key_head

UNKNOWN = "unknown"
Selection = Mapping[int, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Said:
    """What is said of a capture beside its files: its sampler, the model's query and key heads, its name."""

    sampler: Sampler | None = None
    heads: tuple[int, int] | None = None
    model: str = UNKNOWN
    pre: bool = False


def import_heads(folder: Path, target: Path, said: Said) -> list[str]:
    """Writes a run, or a folder of runs, which appears when it is complete; returns what to tell of it.

    Raises:
        RunError: the target exists, a file is missing or not of that layout, or what is said cannot be.
        OSError: it cannot be written; nothing is left of it.
    """
    if target.exists():
        raise RunError(f"{target} exists already: choose another folder with --to")
    files = head_files(folder, pre=said.pre)
    census = Census(count=said.sampler is not None)
    for file in _progress(files, "reading positions"):
        census.add(file, read_rows(file))
    heads = said.heads if said.heads is not None else all_heads(files)
    refuse_heads(files, heads)
    if said.sampler is not None:
        check_law(census, said.sampler)
    made = Making(folder, files, census, replace(said, heads=heads))
    with unfinished(target) as place:
        runs = made.apart(place) if census.ragged else [made.whole(place)]
    return [*_told(target, runs, census, heads), *_unknown(said, heads)]


def all_heads(files: Sequence[HeadFile]) -> tuple[int, int]:
    """How many query and key heads there are, if the files have all that they can have; 0 of a side without files.

    Raises:
        RunError: they do not, so that nobody knows which key head a query head attends with.
    """
    found: dict[str, set[tuple[int, ...]]] = {"q": set(), "k": set()}
    for layer, kind in dict.fromkeys((file.layer, file.kind) for file in files):
        found[KIND[kind].draw].add(tuple(one.head for one in files if (one.layer, one.kind) == (layer, kind)))
    counts = []
    for side, sets in found.items():
        first = min(sets, default=())
        if len(sets) > 1 or first != tuple(range(len(first))):
            raise RunError(
                f"the files have some {'query' if side == 'q' else 'key'} heads of the model, not all of each layer: "
                "say how many it has with --heads QUERY/KEY, such as --heads 32/8"
            )
        counts.append(len(first))
    return counts[0], counts[1]


def refuse_heads(files: Sequence[HeadFile], heads: tuple[int, int]) -> None:
    """Raises RunError where files are of other heads than so many of queries and of keys."""
    queries, keys = heads
    if queries and keys and queries % keys:
        raise RunError(
            f"{queries} query heads cannot share {keys} key heads evenly: say how many there are with --heads"
        )
    for file in files:
        if file.head >= (most := heads["qk".index(KIND[file.kind].draw)]):
            raise RunError(
                f"{file.path} is of head {file.head}, and there are {most} of that side: say so with --heads"
            )


@dataclass
class Making:
    """Files of heads on their way into runs."""

    folder: Path
    files: Sequence[HeadFile]
    census: Census
    said: Said

    def __post_init__(self) -> None:
        self.file = {(one.layer, one.kind, one.head): one for one in self.files}
        self.dims: dict[tuple[int, str], int] = {}
        self.written: dict[tuple[int, str, tuple[int, ...]], tuple[Path, Part]] = {}
        self.listing = Listing.of(self.census.examples())
        self.seed_by = self._seed_by()
        self.sampler = self._sampler()
        self.created = now()

    def whole(self, place: Path) -> Manifest:
        """One run of all files."""
        selection: dict[int, dict[str, tuple[int, ...]]] = {}
        for layer, kind, head in self.file:
            kinds = selection.setdefault(layer, {})
            kinds[kind] = (*kinds.get(kind, ()), head)
        return self.run(place, selection)

    def apart(self, place: Path) -> list[Manifest]:
        """A run for each query head of any layer, and for each key head that is left over."""
        found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
        attended = set()
        for layer, kind, head in self.file:
            if KIND[kind].draw == "q":
                kinds = found.setdefault(f"head-{head:02d}", {}).setdefault(layer, {})
                kinds[kind] = (head,)
                for other, key in self._keys_of(layer, head):
                    kinds[other] = (key,)
                    attended.add((layer, other, key))
        for layer, kind, head in self.file.keys() - attended:
            if KIND[kind].draw == "k":
                found.setdefault(f"key-head-{head:02d}", {}).setdefault(layer, {})[kind] = (head,)
        return [self.run(place / name, dict(sorted(found[name].items()))) for name in sorted(found)]

    def _keys_of(self, layer: int, head: int) -> Iterator[tuple[str, int]]:
        """Kinds and heads of the files with what a query head attends with."""
        assert self.said.heads is not None
        key = key_head(head, *self.said.heads) if self.said.heads[1] else -1
        yield from ((kind, key) for kind in KIND if KIND[kind].draw == "k" and (layer, kind, key) in self.file)

    def run(self, place: Path, selection: Selection) -> Manifest:
        """Writes one run."""
        pairs = [(layer, kind, heads) for layer, kinds in selection.items() for kind, heads in kinds.items()]
        parts = tuple(self.part(place, *one) for one in _progress(pairs, f"writing {place.name.lstrip('.')}"))
        place.mkdir(exist_ok=True)
        for path in RunFolder.DOCUMENTS:
            self.listing.write(place, path)
        manifest = Manifest(
            status="complete",
            seed=0,
            model={"checkpoint": self.said.model},
            dataset=self._dataset(),
            sampler=self.sampler,
            geometry=tuple(map(self._geometry, selection)),
            selection=selection,
            created=self.created,
            finished=self.created,
            versions={},
            commit=None,
            counts=self._counts(),
            parts=parts,
            examples=self.listing.record,
        )
        manifest.save(place)
        return Manifest.load(place)

    def part(self, place: Path, layer: int, kind: str, heads: tuple[int, ...]) -> Part:
        """The part of some heads of a layer and kind; one that is written already gets a second name."""
        path = RunFolder.part(layer, kind, 0, 1 + max(file.layer for file in self.files))
        if (before := self.written.get((layer, kind, heads))) is not None:
            _link(before[0] / path, place / path)
            return before[1]
        files = [self.file[layer, kind, head] for head in heads]
        rows = read_rows(files[0]).rows
        pieces: list[Any] = []
        for file in files:
            found = read_vectors(file, read_rows(file).order)
            if not pieces:
                require_room(f"layer {layer}, kind {kind}", len(heads) * len(rows), found.shape[1])
            self._refuse_dim(file, found.shape[1])
            pieces.append(found)
        told = self.census.windows[layer], None, fields_of(self.sampler), 0, self.seed_by
        footer = Footer(layer, kind, self.dims[layer, kind], "float32", *told)
        part = write_vectors(place, path, heads, pieces, rows, footer)
        self.written[layer, kind, heads] = place, part
        return part

    def _refuse_dim(self, file: HeadFile, dim: int) -> None:
        """All vectors of a layer and kind are of one length, and a query's of its keys', before RoPE and after it."""
        if not dim:
            raise RunError(f"{file.path} has no rows, so that nobody knows how long its vectors are: leave it out")
        alike = (file.kind,) if file.kind == "v" else ("q", "k", "q_pre", "k_pre")
        for kind in alike:
            if (other := self.dims.get((file.layer, kind), dim)) != dim:
                what = f"{dim} numbers, others of kind {kind} in its layer {other}"
                raise RunError(f"{file.path} has vectors of {what}: nothing was imported")
        self.dims[file.layer, file.kind] = dim

    def _geometry(self, layer: int) -> LayerGeometry:
        assert self.said.heads is not None
        counts = dict(zip("qk", self.said.heads, strict=True))
        heads = {kind: counts[KIND[kind].draw] for kind in KINDS if counts[KIND[kind].draw]}
        dims = {kind: self.dims[layer, kind] for kind in KINDS if (layer, kind) in self.dims}
        return LayerGeometry(layer, UNKNOWN, heads, dims, None, self.census.windows[layer])

    def _dataset(self) -> dict[str, Any]:
        told: dict[str, Any] = {"imported": f"files of heads in {self.folder.name}"}
        return told if self.census.sections is None else {**told, "sections": True}

    def _sampler(self) -> dict[str, Any]:
        if self.said.sampler is None:
            return {"_target_": UNKNOWN, "seed_by": list(self.seed_by)}
        sampler = replace(self.said.sampler, seed_by=list(self.seed_by))
        return with_law(Picker(sampler, seed=0), self.census.longest)

    def _seed_by(self) -> tuple[str, ...]:
        """Queries and keys at the same positions were drawn by one hash, others by two."""
        layers = {file.layer for file in self.files}
        one = all(self.census.shared_by((layer, kind) for kind in KIND) for layer in layers)
        return ("example", "layer") if one else ("example", "layer", "kind")

    def _counts(self) -> dict[str, int]:
        lengths = self.census.positions
        return {"examples": len(lengths), "skipped_empty": 0, "truncated": 0, "tokens": sum(lengths.values())}


def _progress(items: Sequence[Any], title: str) -> Iterable[Any]:
    console = rich.get_console()
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _told(target: Path, runs: Sequence[Manifest], census: Census, heads: tuple[int, int]) -> Iterator[str]:
    documents = f"{len(census.positions):,} documents"
    if not census.ragged:
        yield f"{runs[0].rows:,} rows of {documents} in {target}"
        return
    yield f"{len(runs)} runs of {documents} in {target}"
    yield "each head was drawn at positions of its own: there is a run for each query head, with the keys it attends to"


def _unknown(said: Said, heads: tuple[int, int]) -> Iterator[str]:
    if said.heads is None:
        yield f"taken for all heads of the model: {heads[0]} of queries, {heads[1]} of keys; if not so, say --heads"
    if said.sampler is None:
        yield "with which probability rows were kept is not known: take weights=rows in analyses, or say --sampler"
    yield "not known, since such files do not say: token ids, where documents end, RoPE, scaling, what was captured"
