"""The run folder while it is being written: rows become parts, and the manifest names those that count.

Every row is in one place: in a worker's memory, or in a part that the manifest *in memory* names. It changes places
when its part is whole on disk, in a step that cannot fail; only then is the manifest saved. A save that fails
takes nothing back: the manifest in memory stays ahead of the one on disk, and the next save makes up for it. What
the disk never came to know of is captured again by a resumed run, so no row is there twice, whatever failed.

Parts are *pending* while their documents have rows of other (layer, kind) pairs in memory still: they are safe, but
readers do not see them. Once a worker has written all that it held, all pending parts count at once, which is a
*commit*: a reader always sees the same documents in every pair, with all of their rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sniffer.errors import CaptureError, RunError, unbroken
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.observer import draw
from sniffer.forward.selection import Selection
from sniffer.process.environment import now
from sniffer.sampler import Picker
from sniffer.storage.durable import could_not_remove
from sniffer.storage.integrity import leftovers
from sniffer.storage.law import with_law
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.moments import Moved
from sniffer.storage.on_disk import OnDisk
from sniffer.storage.part_writer import PartWriter
from sniffer.storage.schema import Example, Part, generated_in
from sniffer.storage.tokens import Kept
from sniffer.storage.writer import Listing
from sniffer.types import Document, TokenBatch, by_number

log = logging.getLogger(__name__)

NOTHING = OnDisk()


class Store:
    """Writes a run's parts and keeps its manifest.

    `on_disk` is what an earlier session has there; with `tokens`, the documents' token ids are kept. `manifest` is what
    the next save puts on disk; where one has failed, it is ahead of the disk. `saved` is called with each on disk.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        picker: Picker,
        source_dtype: str,
        *,
        compression: str = "auto",
        on_disk: OnDisk = NOTHING,
        tokens: bool = False,
        saved: Callable[[Manifest], None] = lambda manifest: None,
    ) -> None:
        self.folder, self.manifest, self.picker, self._saved = folder, manifest, picker, saved
        geometry, how = by_number(manifest.geometry), (compression, manifest.layout, manifest.has_sections)
        self.writer = PartWriter(folder, geometry, picker, source_dtype, *how)
        self.selection = Selection(
            {(layer, kind): heads for layer, kinds in manifest.selection.items() for kind, heads in kinds.items()}
        )
        self.examples: dict[int, Example] = dict(on_disk.committed)
        self._committed_examples = len(self.examples)
        self.on_disk = on_disk
        self.tokens = Kept(keep=tokens, on_disk=on_disk.tokens)
        self._waiting = on_disk.waiting
        self._moments = {record.path: record for record in manifest.moment_files}
        self._uncounted = self.examples.keys() - (self.examples.keys() if on_disk.moments is None else on_disk.moments)
        self._earlier_timings = manifest.timings
        self._given = -1
        self._listing: Listing | None = None
        self._warned = False

    def begin(self) -> None:
        """Saves a manifest with status `running`, so that from then on the folder is a run's, and tidies up.

        Raises:
            CaptureError: as `adopt`.
        """
        if self.examples:
            self._count_documents()
        else:
            self._change(counts=self._counts())
        self._write()
        self.tidy()

    def add_examples(self, documents: Iterable[Document]) -> None:
        """Remembers which texts the captured rows are from."""
        self._remember(Example.of(document) for document in documents)

    def names(self, batch: TokenBatch) -> bool:
        """Whether the manifest has the batch's documents, or the next save brings them, and with them their moments."""
        ids = [document.example_id for document in batch.documents]
        return all(one in self.examples for one in ids) and not self._uncounted.intersection(ids)

    def lacks(self, batch: TokenBatch) -> bool:
        """Whether a forward pass is needed for a batch: an earlier session has not put all of its rows on disk.

        Raises:
            RunError: a document is not what it was when its rows were captured.
        """
        if not self.on_disk.committed and not self.on_disk.pending:
            return True
        return self.on_disk.lacks(batch, draw(self.picker, self.selection, batch), self.selection.heads)

    def done(self, batch: TokenBatch) -> Mapping[tuple[int, str], frozenset[int]]:
        """Of the batch's documents, those that an earlier session has put on disk, by (layer, kind)."""
        return self.on_disk.done(batch, self.selection.heads)

    def _warn_of(self, parts: Sequence[Part]) -> None:
        """Tells at once of the first part with numbers that are not finite, and not only at the end."""
        found = next((part for part in parts if part.not_finite), None)
        if found is not None and not self._warned:
            self._warned = True
            which, rows = f"layer {found.layer}, kind {found.kind}", f"{found.rows:,}"
            log.warning("%s: of %s vectors %s; they are kept as they are, and counted", which, rows, found.not_finite)

    def next_number(self) -> int:
        """A number for parts to come, and for moments.

        No file has it, named or not: one that could not be written for sure may still come to lie in the folder.
        """
        paths = [part.path for part in (*self.manifest.parts, *self.manifest.pending)]
        self._given = 1 + max([self._given, *map(RunFolder.part_number, (*paths, *self._moments))])
        return self._given

    def adopt(
        self, parts: Sequence[Part], examples: Sequence[Example], *, whole: bool, moments: Moved | None = None
    ) -> None:
        """Names parts that a worker has written into the folder; from then on they count.

        Args:
            parts: with all rows of the examples, unless those are on disk already.
            whole: False where a worker still holds some of them: then the parts stay pending until it has written
                these too, if need be in a resumed run.
            moments: the worker's, of all documents that it has written whole so far.

        Raises:
            CaptureError: the disk is full or cannot be written to.
        """
        self.manifest = replace(self.manifest, pending=(*self.manifest.pending, *parts))
        if whole:
            self._remember(examples)
        else:
            self._waiting |= {example.example_id for example in examples}
        self._warn_of(parts)
        if moments is not None:
            self._require_the_same(examples)
            self._moments.pop(moments.replaces or "", None)
            self._moments[moments.record.path] = moments.record
            self._uncounted -= {example.example_id for example in examples}
        if whole and self._waiting <= self.examples.keys():
            self._promote()
        else:
            self._write()

    def tidy(self) -> None:
        """Removes parts that were begun, or written and not named, by workers that are gone.

        Raises:
            CaptureError: one could not be removed.
        """
        for path in leftovers(self.folder, self.manifest):
            self._remove(path)

    def _remove(self, path: str) -> None:
        try:
            (self.folder / path).unlink(missing_ok=True)
        except OSError as error:
            raise CaptureError(could_not_remove(error, self.folder / path)) from error

    def complete(self, *, last: bool) -> None:
        """Puts the folder in order once workers have written what they held.

        Each (layer, kind) gets a part, an empty one if need be, so that a reader finds all of them. After an
        interruption, parts of documents that this session has not met yet may be pending: then everything stays
        pending until it has, or until this is the `last` commit of a whole run.

        Raises:
            CaptureError: as `adopt`.
        """
        started = {(part.layer, part.kind) for part in (*self.manifest.parts, *self.manifest.pending)}
        if missing := [pair for pair in self.selection.heads if pair not in started]:
            nothing, number = Accumulator(self.selection), self.next_number()
            empty = [self.writer.write(nothing, pair, number) for pair in missing]
            self.manifest = replace(self.manifest, pending=(*self.manifest.pending, *empty))
        told = self.manifest.examples is not None and len(self.examples) == self._committed_examples
        told = told and not self.tokens.waiting(self.examples)
        told = told and self.manifest.moment_files == tuple(self._moments.values())
        if (last or self._waiting <= self.examples.keys()) and (self.manifest.pending or not told):
            self._promote()
        self.tidy()

    def close(
        self, left_out: Mapping[str, int], timings: dict[str, float], interrupted_by: BaseException | None = None
    ) -> None:
        """Saves the run's end: complete, or interrupted and by what. May be called again where it failed.

        Args:
            left_out: counts of what is in no document (`ReadCounts.left_out`).

        Raises:
            CaptureError: as `adopt`.
        """
        earlier = self._earlier_timings
        self._change(
            status="complete" if interrupted_by is None else "interrupted",
            reason=None if interrupted_by is None else describe_interruption(interrupted_by),
            finished=now(),
            counts={**self.manifest.counts, **left_out},
            timings={stage: round(seconds + earlier.get(stage, 0.0), 3) for stage, seconds in timings.items()},
        )
        self._write()

    def _remember(self, examples: Iterable[Example]) -> None:
        """Of what a model has written, what is on disk stands, since the rows there are of it."""
        written = {number for number, one in self.on_disk.committed.items() if one.generated is not None}
        self.examples |= {one.example_id: one for one in examples if one.example_id not in written}

    def _require_the_same(self, examples: Iterable[Example]) -> None:
        """Raises RunError where a document whose rows are on disk, and its moments not, was generated otherwise."""
        for one in examples:
            if one.example_id in self._uncounted and one.generated != self.examples[one.example_id].generated:
                raise RunError(
                    f"document {one.source_id!r} was generated with other tokens than when its rows were captured: its "
                    "moments cannot be made anew; capture again into a new folder"
                )

    def _promote(self) -> None:
        """Makes all pending parts count, and their documents with them."""
        if self._listing is not None:
            # A save failed half way: the disk may have either manifest, and must come to fit one for sure before
            # the files of documents change again.
            self._write()
        tokens = self.tokens.write(self.folder, self.examples, self.manifest.tokens)
        before = {record.path for record in self.manifest.moment_files}
        self.manifest = replace(self.manifest, tokens=tokens, moment_files=tuple(self._moments.values()))
        commit = 1 + max((part.commit for part in self.manifest.parts), default=-1)
        new = tuple(replace(part, commit=commit) for part in self.manifest.pending)
        self._count_documents(parts=(*self.manifest.parts, *new), pending=())
        self._committed_examples = len(self.examples)
        self._waiting = frozenset()
        self._write()
        for path in before - self._moments.keys():
            self._remove(path)

    def _count_documents(self, **changes: object) -> None:
        """Has the manifest count all documents met so far, along with other changes."""
        listing = Listing.of(self.examples.values())
        self._change(examples=listing.record, counts=self._counts(), **changes)
        self._listing = listing

    def _counts(self) -> dict[str, int]:
        return {
            "examples": len(self.examples),
            "skipped_empty": self.manifest.counts.get("skipped_empty", 0),
            "truncated": sum(example.truncated for example in self.examples.values()),
            "tokens": sum(example.n_tokens for example in self.examples.values()),
            **({} if self.manifest.generation is None else {"generated": generated_in(self.examples.values())}),
        }

    def _change(self, **changes: object) -> None:
        """Changes what the next save says."""
        longest = max((example.n_tokens for example in self.examples.values()), default=0)
        self.manifest = replace(self.manifest, sampler=with_law(self.picker, longest), **changes)  # type: ignore[arg-type]

    def _write(self) -> None:
        """Brings the disk to what the manifest says; whatever fails, calling it again makes up for it."""
        save(self.folder, self.manifest, self._listing)
        self._listing = None
        self._saved(self.manifest)


def save(folder: Path, manifest: Manifest, listing: Listing | None) -> None:
    """Saves a manifest, and with it the documents that it counts, where they have changed.

    At each moment one of examples.parquet and its twin fits the manifest on disk.

    Raises:
        CaptureError: the disk is full or cannot be written to.
    """
    if listing is not None:
        listing.write(folder, RunFolder.EXAMPLES)
    manifest.save(folder)
    if listing is not None:
        listing.write(folder, RunFolder.EXAMPLES_TWIN)


def describe_interruption(error: BaseException) -> str:
    """One line for the manifest."""
    name = type(error).__name__
    return f"{name}: {unbroken(error)}" if str(error).strip() else name
