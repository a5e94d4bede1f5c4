"""The run folder while it is being written: rows become parts, and the manifest names those that count.

Every row is in one place: in the accumulator, or in a part that the manifest *in memory* names. It changes places
when its part is whole on disk, in a step that cannot fail; only then is the manifest saved. A save that fails
takes nothing back: the manifest in memory stays ahead of the one on disk, and the next save makes up for it. What
the disk never came to know of is captured again by a resumed run, so no row is there twice, whatever failed.

Rows leave memory in two steps. A *spill* writes the rows of some (layer, kind) pairs as parts, which the
manifest names as pending: they are safe, but readers do not see them, since their documents may have
rows of other pairs in memory still. A *commit* spills all pairs, and then all pending parts count at once: a
reader always sees the same documents in every pair, with all of their rows. It happens between batches:
after `checkpoint_every` documents, and at the end. Beyond `memory_limit` bytes the largest pairs are spilled
until half of that is left, so that pairs with few heads get few, large parts; once the pending parts
outweigh the limit COMMIT_AFTER times, a commit brings them into sight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from sniffer.errors import CaptureError, unbroken
from sniffer.forward.accumulator import Accumulator
from sniffer.process.environment import now
from sniffer.sampler import Picker, describe
from sniffer.storage.durable import could_not_remove
from sniffer.storage.integrity import leftovers
from sniffer.storage.manifest import Manifest
from sniffer.storage.on_disk import Kept
from sniffer.storage.part_writer import PartWriter, Progress, unseen
from sniffer.storage.schema import EXAMPLES_PATH, EXAMPLES_TWIN_PATH, Example, Part
from sniffer.storage.writer import Listing
from sniffer.types import Document

log = logging.getLogger(__name__)

COMMIT_AFTER = 4
"""Times the memory limit that pending parts may hold in bytes."""

NOTHING_KEPT = Kept()


class Store:
    """Writes a run's parts and keeps its manifest.

    `kept` is what an earlier session has on disk. `manifest` is what the next save puts on disk; where one has
    failed, it is ahead of the disk.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        picker: Picker,
        source_dtype: str,
        *,
        compression: str = "auto",
        checkpoint_every: int | None = None,
        memory_limit: float = float("inf"),
        kept: Kept = NOTHING_KEPT,
        progress: Progress = unseen,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.picker = picker
        geometry = {layer.layer: layer for layer in manifest.geometry}
        self.writer = PartWriter(folder, geometry, picker, source_dtype, compression)
        self.checkpoint_every = checkpoint_every
        self.memory_limit = memory_limit
        self.examples: dict[int, Example] = dict(kept.committed)
        self._committed_examples = len(self.examples)
        self.kept = kept
        self._progress = progress
        self._waiting = kept.waiting
        self._earlier_timings = manifest.timings
        self._given: dict[tuple[int, str] | None, int] = {}
        self._listing: Listing | None = None
        self._warned = False

    def begin(self) -> None:
        """Saves a manifest with status `running`, so that from then on the folder is a run's, and tidies up.

        Raises:
            CaptureError: as `relieve`.
        """
        if self.examples:
            self._count_documents()
        else:
            self._change(counts=self._counts())
        self._write()
        self.tidy()

    def add_examples(self, documents: Iterable[Document]) -> None:
        """Remembers which texts the captured rows are from."""
        self.examples |= {document.example_id: Example.of(document) for document in documents}

    def relieve(self, accumulator: Accumulator) -> None:
        """After a batch: writes what has been in memory for long enough, or is too much for it.

        Raises:
            CaptureError: the disk is full or cannot be written to. What could not be written is still in
                the accumulator.
        """
        uncommitted = len(self.examples) - self._committed_examples
        if self.checkpoint_every is not None and uncommitted >= self.checkpoint_every:
            self.commit(accumulator)
        elif accumulator.nbytes > self.memory_limit:
            self.spill(accumulator, _largest(accumulator, self.memory_limit / 2))
            if sum(part.bytes for part in self.manifest.pending) > COMMIT_AFTER * self.memory_limit:
                self.commit(accumulator)

    def spill(self, accumulator: Accumulator, pairs: Sequence[tuple[int, str]]) -> None:
        """Writes the rows of some (layer, kind) pairs, one part each, as pending.

        Raises:
            CaptureError: as `relieve`. Parts that were written are named all the same, where possible.
        """
        numbers = {pair: self.next_number(pair) for pair in pairs}
        before = self.manifest
        try:
            with self._progress(len(pairs)) as done:

                def told(part: Part | None) -> None:
                    if part is not None:
                        self._take_over(part, accumulator)
                    done()

                self.writer.write_all(accumulator, numbers, told)
        finally:
            if self.manifest is not before:
                self._write()

    def _take_over(self, part: Part, accumulator: Accumulator) -> None:
        """A part is on disk: its rows are the manifest's from here on, and the accumulator's no longer."""
        self.manifest = replace(self.manifest, pending=(*self.manifest.pending, part))
        accumulator.release(part.layer, part.kind)
        self._warn_of([part])

    def _warn_of(self, parts: Sequence[Part]) -> None:
        """Tells at once of the first part with numbers that are not finite, and not only at the end."""
        found = next((part for part in parts if part.not_finite), None)
        if found is not None and not self._warned:
            self._warned = True
            which, rows = f"layer {found.layer}, kind {found.kind}", f"{found.rows:,}"
            log.warning("%s: of %s vectors %s; they are kept as they are, and counted", which, rows, found.not_finite)

    def next_number(self, pair: tuple[int, str] | None = None) -> int:
        """A number for the next part of a (layer, kind), or without one for parts of any.

        No part has it, named or not: one that could not be written for sure may still come to lie in the folder.
        """
        parts = (*self.manifest.parts, *self.manifest.pending)
        named = (part.number for part in parts if pair in (None, (part.layer, part.kind)))
        given = self._given.values() if pair is None else (self._given.get(one, -1) for one in (pair, None))
        self._given[pair] = 1 + max([-1, *named, *given])
        return self._given[pair]

    def adopt(self, parts: Sequence[Part], examples: Sequence[Example], *, whole: bool) -> None:
        """Names parts that a worker has written into the folder; from then on they count.

        Args:
            parts: with all rows of the examples, unless those are on disk already.
            whole: False where some could not be written: then they stay pending, for a resumed run.

        Raises:
            CaptureError: as `relieve`.
        """
        documents = {example.example_id: example for example in examples}
        self.manifest = replace(self.manifest, pending=(*self.manifest.pending, *parts))
        if whole:
            self.examples |= documents
        else:
            self._waiting |= documents.keys()
        self._warn_of(parts)
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
            try:
                (self.folder / path).unlink(missing_ok=True)
            except OSError as error:
                raise CaptureError(could_not_remove(error, self.folder / path)) from error

    def commit(self, accumulator: Accumulator, *, last: bool = False) -> None:
        """Writes all that was accumulated; from then on it counts.

        After an interruption, parts of documents that this session has not met yet may be pending: then
        everything stays pending until it has, or until this is the `last` commit of a whole run.

        Raises:
            CaptureError: as `relieve`.
        """
        started = {(part.layer, part.kind) for part in (*self.manifest.parts, *self.manifest.pending)}
        pairs = [(layer, kind) for layer, kinds in self.manifest.selection.items() for kind in kinds]
        held = set(accumulator.by_size())
        self.spill(accumulator, [pair for pair in pairs if pair in held or pair not in started])
        if last or self._waiting <= self.examples.keys():
            self._promote()

    def close(self, skipped_empty: int, timings: dict[str, float], interrupted_by: BaseException | None = None) -> None:
        """Saves the run's end: complete, or interrupted and by what. May be called again where it failed.

        Raises:
            CaptureError: as `relieve`.
        """
        earlier = self._earlier_timings
        self._change(
            status="complete" if interrupted_by is None else "interrupted",
            reason=None if interrupted_by is None else describe_interruption(interrupted_by),
            finished=now(),
            counts={**self.manifest.counts, "skipped_empty": skipped_empty},
            timings={stage: round(seconds + earlier.get(stage, 0.0), 3) for stage, seconds in timings.items()},
        )
        self._write()

    def _promote(self) -> None:
        """Makes all pending parts count, and their documents with them."""
        if self._listing is not None:
            # A save failed half way: the disk may have either manifest, and must come to fit one for sure before
            # the files of documents change again.
            self._write()
        commit = 1 + max((part.commit for part in self.manifest.parts), default=-1)
        new = tuple(replace(part, commit=commit) for part in self.manifest.pending)
        self._count_documents(parts=(*self.manifest.parts, *new), pending=())
        self._committed_examples = len(self.examples)
        self._waiting = frozenset()
        self._write()

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
        }

    def _change(self, **changes: object) -> None:
        """Changes what the next save says."""
        longest = max((example.n_tokens for example in self.examples.values()), default=0)
        law = {
            **describe(self.picker.sampler),
            "probability_by_bucket": self.picker.probability_by_bucket(longest),
        }
        self.manifest = replace(self.manifest, sampler=law, **changes)  # type: ignore[arg-type]

    def _write(self) -> None:
        """Brings the disk to what the manifest says; whatever fails, calling it again makes up for it."""
        save(self.folder, self.manifest, self._listing)
        self._listing = None


def save(folder: Path, manifest: Manifest, listing: Listing | None) -> None:
    """Saves a manifest, and with it the documents that it counts, where they have changed.

    At each moment one of examples.parquet and its twin fits the manifest on disk.

    Raises:
        CaptureError: the disk is full or cannot be written to.
    """
    if listing is not None:
        listing.write(folder, EXAMPLES_PATH)
    manifest.save(folder)
    if listing is not None:
        listing.write(folder, EXAMPLES_TWIN_PATH)


def _largest(accumulator: Accumulator, leave: float) -> list[tuple[int, str]]:
    """The largest (layer, kind) pairs, so many that at most `leave` bytes are left without them."""
    left, chosen = accumulator.nbytes, []
    for pair in accumulator.by_size():
        if left <= leave:
            break
        chosen.append(pair)
        left -= accumulator.held(*pair)
    return chosen


def describe_interruption(error: BaseException) -> str:
    """One line for the manifest."""
    name = type(error).__name__
    return f"{name}: {unbroken(error)}" if str(error).strip() else name
