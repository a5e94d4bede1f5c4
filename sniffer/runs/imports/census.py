"""What files of heads together say of a capture, before any vector is read.

Nothing is known of documents but the positions that were captured: each is taken to end with the last of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from sniffer.errors import RunError
from sniffer.runs.imports.heads import HeadFile, HeadRows
from sniffer.storage.schema import Example
from sniffer.types import KIND, Rows, Sections


@dataclass(frozen=True)
class Kept:
    """How many positions of a bucket of a document were kept, where any were; the same two may be there twice."""

    example_ids: np.ndarray
    buckets: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, rows: Rows) -> Kept:
        # In the order of a part rows of one bucket and document follow one another, within a section.
        begins = np.diff(rows.bucket, prepend=-1) != 0
        begins[1:] |= np.diff(rows.example_id) != 0
        first = np.flatnonzero(begins)
        return cls(rows.example_id[first], rows.bucket[first], np.diff(first, append=len(rows)).astype(np.int32))


@dataclass
class Census:
    """What was met in the files so far.

    Attributes:
        positions: by document, the number up to its last captured position.
        buckets: of each position, where one was met; -1 elsewhere.
        windows: by layer.
        shared: by (layer, kind, head), what tells one set of positions from another.
        count: whether to count what was kept, for who knows the sampler.
        kept: by such a set, how many positions of each bucket of each document.
        sections: by document, which captured positions have which section; None where there are none.
    """

    count: bool = True
    positions: dict[int, int] = field(default_factory=dict)
    buckets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    windows: dict[int, int | None] = field(default_factory=dict)
    shared: dict[tuple[int, str, int], str] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    sections: dict[int, dict[int, str]] | None = None

    def add(self, file: HeadFile, found: HeadRows) -> None:
        """Counts the rows of one file; raises RunError where it does not fit those before."""
        rows = found.rows
        if self.windows.setdefault(file.layer, found.window) != found.window:
            other = self.windows[file.layer]
            raise RunError(f"{file.path} has sliding window {found.window}, other files of its layer have {other}")
        if self.shared and (rows.section is not None) != (self.sections is not None):
            raise RunError(f"{file.path} has {'a' if rows.section is not None else 'no'} column section, others not so")
        self._add_buckets(file, rows)
        ids, starts = np.unique(rows.example_id, return_inverse=True)
        last = np.full(len(ids), -1)
        np.maximum.at(last, starts, rows.position)
        for number, position in zip(ids.tolist(), last.tolist(), strict=True):
            self.positions[number] = max(self.positions.get(number, 0), position + 1)
        if rows.section is not None:
            self._add_sections(file, rows)
        told = hashlib.sha256(b"".join(column.tobytes() for column in rows.columns().values())).hexdigest()
        self.shared[file.layer, file.kind, file.head] = told
        if self.count:
            self.kept[f"{told} {KIND[file.kind].draw}"] = Kept.of(rows)

    def _add_buckets(self, file: HeadFile, rows: Rows) -> None:
        """A bucket belongs to a position, in every file."""
        most = int(rows.position.max(initial=-1)) + 1
        if most > len(self.buckets):
            self.buckets = np.concatenate([self.buckets, np.full(most - len(self.buckets), -1, dtype=np.int32)])
        before = self.buckets[rows.position]
        self.buckets[rows.position] = rows.bucket
        wrong = ((before >= 0) & (before != rows.bucket)) | (self.buckets[rows.position] != rows.bucket)
        if wrong.any():
            at = int(np.argmax(wrong))
            buckets = sorted({int(before[at]), int(rows.bucket[at]), int(self.buckets[rows.position[at]])} - {-1})
            raise RunError(
                f"{file.path} has position {rows.position[at]} in another bucket than elsewhere "
                f"({' and '.join(map(str, buckets))}): captures with other bucket sizes are no one run"
            )

    def _add_sections(self, file: HeadFile, rows: Rows) -> None:
        assert rows.section is not None
        self.sections = {} if self.sections is None else self.sections
        places = zip(rows.example_id.tolist(), rows.position.tolist(), rows.section.array.tolist(), strict=True)
        for number, position, name in places:
            if self.sections.setdefault(number, {}).setdefault(position, name) != name:
                raise RunError(
                    f"{file.path} has position {position} of example {number} in another section than others"
                )

    @property
    def longest(self) -> int:
        return max(self.positions.values(), default=0)

    @property
    def ragged(self) -> bool:
        """Whether heads of one layer and kind have positions of their own."""
        by_pair: dict[tuple[int, str], set[str]] = {}
        for (layer, kind, _), told in self.shared.items():
            by_pair.setdefault((layer, kind), set()).add(told)
        return any(len(told) > 1 for told in by_pair.values())

    def examples(self) -> list[Example]:
        """The documents, as far as they are known."""
        return [
            Example(number, str(number), n_tokens, truncated=False, sections=self._sections(number, n_tokens))
            for number, n_tokens in sorted(self.positions.items())
        ]

    def _sections(self, number: int, n_tokens: int) -> Sections | None:
        if self.sections is None:
            return None
        known = self.sections.get(number, {}).items()
        return Sections.spread(((place, place + 1, name) for place, name in known), n_tokens)

    def shared_by(self, pairs: Iterable[tuple[int, str]]) -> bool:
        """Whether some layers and kinds, all heads of them, have the same positions."""
        wanted = set(pairs)
        return len({told for (layer, kind, _), told in self.shared.items() if (layer, kind) in wanted}) <= 1
