"""What an earlier, stopped session of a run has on disk: of which documents nothing need be captured again.

A committed document is there for every (layer, kind). A document of a pending part is there for that pair
only. What is missing follows from the law: positions that a draw keeps, of a document whose rows of that
pair are not on disk. So a run is resumed exactly, whatever stopped it, and a damaged file is made good
by capturing its rows again: its whole commit becomes pending, and lacks just them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sniffer.errors import RunError, unbroken
from sniffer.storage.documents import repeated
from sniffer.storage.examples import read_examples
from sniffer.storage.integrity import damage
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.model_config import lost_model_config
from sniffer.storage.moments import documents_of
from sniffer.storage.schema import Example, FileRecord, Part
from sniffer.storage.there import NOTHING, There
from sniffer.storage.tokens import example_ids
from sniffer.types import MOMENTS, Document, Picks, TokenBatch, draw_of

log = logging.getLogger(__name__)

READERS = 4
Pair = tuple[int, str]
"""(layer, kind), or (layer, draw)."""


@dataclass(frozen=True)
class OnDisk:
    """Documents on disk: `committed` for every (layer, kind), `pending` example ids for some.

    `strict`: a document that is not what it was is refused. `tokens`: documents whose token ids are there. `moments`:
    documents whose moments are; None where none are wanted.
    """

    committed: Mapping[int, Example] = field(default_factory=dict)
    pending: Mapping[Pair, frozenset[int]] = field(default_factory=dict)
    strict: bool = True
    tokens: frozenset[int] = frozenset()
    moments: frozenset[int] | None = None

    @property
    def waiting(self) -> frozenset[int]:
        """Documents that are there for some (layer, kind) and not, or not for sure, for all."""
        return frozenset().union(*self.pending.values())

    def done(self, batch: TokenBatch, pairs: Iterable[Pair]) -> dict[Pair, frozenset[int]]:
        """Of the batch's documents, those that are there, by (layer, kind)."""
        if not self.committed and not self.pending and not self.moments:
            return {}
        ids = frozenset(document.example_id for document in batch.documents)
        everywhere = ids & self.committed.keys()
        found = {pair: everywhere | (ids & self.pending.get(pair, frozenset())) for pair in pairs}
        return found if self.moments is None else {**found, MOMENTS: ids & self.moments}

    def lacks(self, batch: TokenBatch, picks: Mapping[Pair, Picks], pairs: Iterable[Pair]) -> bool:
        """Whether a forward pass is needed: some draw keeps a position whose row is not on disk.

        Raises:
            RunError: a document is not what it was when its rows were captured.
        """
        for document in batch.documents if self.strict else ():
            self._check(document)
        if self.moments is not None and any(document.example_id not in self.moments for document in batch.documents):
            return True
        new = [row for row, document in enumerate(batch.documents) if document.example_id not in self.committed]
        if not new or not self.pending:
            return bool(new)
        return any(self._lacks(batch, picks[draw_of(pair)], pair, new) for pair in pairs)

    def _lacks(self, batch: TokenBatch, drawn: Picks, pair: Pair, new: list[int]) -> bool:
        there = self.pending.get(pair, frozenset())
        missing = [row for row in new if batch.documents[row].example_id not in there]
        return bool(np.isin(drawn.rows, missing).any())

    def _check(self, document: Document) -> None:
        then = self.committed.get(document.example_id)
        if then is not None and (then := then.prompt) != (now := Example.of(document)):
            what = f"{then.n_tokens} tokens when it was captured, {now.n_tokens} now"
            if replace(then, sections=now.sections) == now:
                what = "its sections are others than when it was captured"
            raise RunError(
                f"document {document.source_id!r} has changed: {what}; put the text back, or capture again into a new "
                "folder"
            )


def look(folder: Path, manifest: Manifest, there: There = NOTHING) -> tuple[Manifest, OnDisk]:
    """Reads what is on disk, every byte of it, and tells what the manifest should say of it now.

    Damaged files are logged, and no longer named, and so are files whose rows another one has too; what else
    belongs to their commit becomes pending. What is `there`, at the run's copy, was proven before it left.
    """
    here = [part for part in (*manifest.parts, *manifest.pending) if part.path not in there.paths]
    whole = _whole(folder, here)
    spare, beside = _twice(folder, [part for part in here if part.path in whole])
    whole = (whole - spare) | there.paths
    examples = find_examples(folder, manifest)
    broken = {
        part.commit for part in manifest.parts if part.path not in whole or part.path in beside or examples is None
    }
    committed = tuple(part for part in manifest.parts if part.commit not in broken)
    demoted = (part for part in manifest.parts if part.commit in broken)
    pending = tuple(part for part in (*manifest.pending, *demoted) if part.path in whole)
    documents = examples or {}
    if broken:
        still = frozenset().union(*there.examples_by_pair(folder, committed).values())
        documents = {number: example for number, example in documents.items() if number in still}
    if manifest.generation is not None:
        # What is written anew may be other tokens by a rounding: a document has all of its rows from one time.
        pending = ()
    tokens = dict(_whole_tokens(folder, manifest, documents))
    kept = tuple(record for record in manifest.tokens if record.path in tokens)
    counted = dict(_whole_moments(folder, manifest))
    if manifest.generation is not None:  # for the same reason
        counted = {path: there for path, there in counted.items() if there <= documents.keys()}
    of_moments = tuple(record for record in manifest.moment_files if record.path in counted)
    found = replace(manifest, parts=committed, pending=pending, examples=None, tokens=kept, moment_files=of_moments)
    in_tokens, in_moments = (frozenset().union(*sets.values()) for sets in (tokens, counted))
    moments = None if manifest.moments is None else in_moments
    by_pair = there.examples_by_pair(folder, pending)
    return found, OnDisk(documents, by_pair, tokens=in_tokens, moments=moments)


def is_whole(folder: Path, manifest: Manifest, found: Manifest) -> bool:
    """Whether nothing is missing of what a complete run's manifest names; `found` is what `look` made of it."""
    files = [(one.parts, one.tokens, one.moment_files) for one in (manifest, found)]
    return files[0] == files[1] and not found.pending and not lost_model_config(folder, manifest)


def _whole_moments(folder: Path, manifest: Manifest) -> Iterator[tuple[str, frozenset[int]]]:
    """The undamaged files of moments with their documents; one that shares a document with another is left out."""
    met: set[int] = set()
    for record in manifest.moment_files:
        there, wrong = _documents_in(folder, record, documents_of)
        if wrong is None and met & there:
            wrong = "has documents that another file of moments has"
        if wrong:
            log.warning("%s %s: its documents will be counted again", record.path, wrong)
        else:
            met |= there
            yield record.path, there


def _whole_tokens(
    folder: Path, manifest: Manifest, documents: Mapping[int, Example]
) -> Iterator[tuple[str, frozenset[int]]]:
    """The undamaged files of token ids with their documents; one with a document that does not count is left out."""
    for record in manifest.tokens:
        there, wrong = _documents_in(folder, record, example_ids)
        if wrong:
            log.warning("%s %s: its token ids will be written again", record.path, wrong)
        elif there <= documents.keys():
            yield record.path, there


def _documents_in(
    folder: Path, record: FileRecord, read: Callable[[Path, FileRecord], frozenset[int]]
) -> tuple[frozenset[int], str | None]:
    """The documents that a file is of, none where it is damaged; and what is wrong with it, if anything is."""
    wrong = damage(folder, record)
    try:
        return (frozenset() if wrong else read(folder, record)), wrong
    except (OSError, ValueError) as error:
        return frozenset(), unbroken(error)


def find_examples(folder: Path, manifest: Manifest) -> dict[int, Example] | None:
    """The committed documents, by example id, from examples.parquet or its twin; None if both are damaged."""
    record = manifest.examples
    if record is None:
        return {}
    for path in (record.path, RunFolder.EXAMPLES_TWIN):
        if damage(folder, replace(record, path=path)) is None:
            try:
                return read_examples(folder / path, record)
            except (OSError, ValueError) as error:
                log.warning("%s %s", path, unbroken(error))
    log.warning("%s is damaged: it will be written again", record.path)
    return None


def _whole(folder: Path, parts: Iterable[Part]) -> set[str]:
    """The paths of those that are undamaged."""
    ordered = list(parts)
    with ThreadPoolExecutor(READERS, "reader") as pool:
        wrongs = dict(
            zip([part.path for part in ordered], pool.map(lambda part: damage(folder, part), ordered), strict=True)
        )
    for path, wrong in wrongs.items():
        if wrong:
            log.warning("%s %s: its rows will be captured again", path, wrong)
    return {path for path, wrong in wrongs.items() if not wrong}


def _twice(folder: Path, parts: Iterable[Part]) -> tuple[set[str], set[str]]:
    """The paths of parts whose rows are in others too, and of those others.

    Releases up to 0.1.0 could write rows twice after a write that failed.
    """
    found = list(repeated(folder, parts))
    for part, other in found:
        log.warning("%s has rows that %s has too: it is left out", part.path, other.path)
    return {part.path for part, _ in found}, {other.path for _, other in found}
