"""What a worker tells of a batch, and of what it has written: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sniffer.storage.moments import Moved
from sniffer.storage.part_writer import Writing
from sniffer.storage.schema import Example, Part
from sniffer.types import Difference


@dataclass(frozen=True)
class Report:
    """After a batch: rows and bytes held since the last flush, and seconds by stage since the last report.

    `leaving` are bytes that are in memory beside those, since they are being written. `differences`: between what was
    captured live and afterwards, of this batch (generate.live=both).
    """

    rows: int
    nbytes: int
    seconds: Mapping[str, float]
    leaving: int = 0
    differences: Mapping[tuple[int, str], Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class Flushed:
    """What was written: parts with rows of these documents, `whole` if with all of them.

    Of what is not whole, the rest is still held: `nbytes` of it, and all documents come again with what is written
    next. `rows` were captured since the last flush that was whole. `failure` says why some rows could not be had, or
    not be written. `moments` are those of all documents so far, where any are wanted and what was written is whole.
    """

    parts: tuple[Part, ...]
    examples: tuple[Example, ...]
    rows: int
    nbytes: int
    seconds: Mapping[str, float]
    whole: bool = True
    failure: Exception | None = None
    moments: Moved | None = None


@dataclass(frozen=True)
class Leaving:
    """Rows that are being written, of which nothing is held elsewhere any more, and the documents that they are of.

    `whole` if these documents have no other rows in memory; then `rows` counts theirs by kind. `failure` says why rows
    are missing. `moments` are written by then, where these documents are whole.
    """

    writing: Writing
    examples: tuple[Example, ...]
    rows: Mapping[str, int]
    whole: bool
    failure: Exception | None
    moments: Moved | None
