"""Which calls of a model begin something, and which go on with an earlier call, and with which of its rows.

A generation calls the model for its prompt, and then a token at a time: with the cache that the prompt has filled, or
without one for all tokens again. Long prompts come in chunks. A row that goes on belongs to the document that it goes
on with. Where several rows go on with one, as beams do, the first has its document, and each other one is a *branch*: a
document of its own, which begins at the position where it parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int32
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.notebook.caches import Held
from sniffer.notebook.call import Call, earlier_tokens
from sniffer.notebook.pieces import Begun
from sniffer.sampler.identity import branch_id

Cut = Callable[[Mapping[int, int]], None]


@dataclass(frozen=True)
class Branch:
    """Where a document parts from another: its first token is at `position`, and what is before is `parent`'s."""

    parent: int
    position: int


@dataclass
class _Line:
    """A cache, and the rows in it."""

    held: Held
    rows: list[Begun]
    columns: int
    last: int
    """Columns that the last call has added, of these."""


class CallHistory:
    """What is remembered of earlier calls.

    `ends` is the position after the last token of each document that may be gone on with; `branches` are those that
    have parted from others; `taken_back` counts tokens that a cache has lost since.

    Args:
        cut: is given the position from which on documents have no tokens after all.
    """

    def __init__(self, cut: Cut = lambda ends: None) -> None:
        self.taken_back = 0
        self.branches: dict[int, Branch] = {}
        self.ends: dict[int, int] = {}
        self._cut = cut
        self._lines: list[_Line] = []
        self._last: tuple[Int32[np.ndarray, "batch seq"], list[Begun]] | None = None

    def held_by(self, call: Call) -> tuple[int, list[Begun] | None]:
        """How many columns a call's cache holds, and its rows; None where they are not known.

        Raises:
            CaptureError: the cache does not say what it holds, or which of its rows is which.
        """
        self.settle()
        held = earlier_tokens(call.cache)
        if not held:
            return 0, None
        line = next((one for one in self._lines if one.held.is_of(call.cache)), None) or self._twin(call.cache, held)
        if line is None or line.columns != held:
            return held, None
        sources = line.held.sources(call.cache, call.shape[0])
        return held, [line.rows[source] for source in sources]

    def repeated_by(self, call: Call) -> list[Begun] | None:
        """The rows of the call before, where this one has no cache and the same tokens, and one more each."""
        if call.cache is not None or self._last is None:
            return None
        tokens, (last, rows) = as_array(call.tokens), self._last
        if last.shape != (tokens.shape[0], tokens.shape[1] - 1):
            return None
        place = {row.tobytes(): number for number, row in reversed(list(enumerate(last)))}
        found = [n if (last[n] == row[:-1]).all() else place.get(row[:-1].tobytes()) for n, row in enumerate(tokens)]
        return None if any(one is None for one in found) else [rows[one] for one in found if one is not None]

    def documents(self, rows: Sequence[Begun]) -> tuple[list[int], dict[int, Branch]]:
        """The document of each row that goes on: its own, once, and a branch for each other row; with the branches."""
        found: list[int] = []
        branches: dict[int, Branch] = {}
        for row in rows:
            document = row.document
            if document in found or self.ends.get(document, row.position) != row.position:
                document = self._branch(row, found)
                branches[document] = Branch(row.document, row.position)
            found.append(document)
        return found, branches

    def note(self, call: Call, cache: Any, rows: Sequence[Begun], branches: Mapping[int, Branch]) -> None:
        """Remembers a call that went well, with its rows as they are after it, and the cache that it leaves."""
        self.branches |= branches
        self.ends |= {row.document: row.position for row in rows}
        self._lines = [line for line in self._lines if not line.held.is_of(cache)]
        self._last = (as_array(call.tokens), list(rows)) if call.cache is None else None
        held = None if cache is None else Held.of(cache, call.shape[0])
        if held is not None and len(rows) == call.shape[0]:
            self._lines.append(_Line(held, list(rows), held.columns, call.shape[1]))

    def forget(self) -> None:
        """Lets go of all caches."""
        self._lines.clear()
        self._last = None

    def forget_the_last(self) -> None:
        """Nothing was kept of the last call, so nothing goes on with it."""
        self._last = None

    def settle(self) -> None:
        """Takes back what caches have lost; of those that nobody has any more, nothing is remembered then."""
        for line in self._lines:
            lost = line.columns - line.held.now()
            if lost > 0:
                self._take_back(line, lost)
        self._lines = [line for line in self._lines if not line.held.gone]

    def _take_back(self, line: _Line, lost: int) -> None:
        """A cache has lost its last columns.

        A call that keeps some of its tokens has made guesses; one that loses all of them was a text, and another one
        begins where it did.
        """
        now = line.columns - lost
        rows = [_shortened(row, now) for row in line.rows]
        if lost < line.last:
            known = [(old, new) for old, new in zip(line.rows, rows, strict=True) if old != new]
            ends = {old.document: new.position for old, new in known if self.ends.get(old.document) == old.position}
            self.taken_back += sum(self.ends[document] - end for document, end in ends.items())
            self.ends |= ends
            self._cut(ends)
        line.rows, line.columns, line.last = rows, now, max(0, line.last - lost)

    def _branch(self, row: Begun, taken: Sequence[int]) -> int:
        """A number for what parts from a document, the same whenever it does so at that place as that branch."""
        n = 0
        while True:
            number = branch_id(row.document, row.position, n)
            if number not in taken and number not in self.branches:
                return number
            n += 1

    def _twin(self, cache: Any, held: int) -> _Line | None:
        """The line that a copy of its cache goes on with, as of a prompt that is shared; None where several may be."""
        found = [line for line in self._lines if line.columns == held == line.held.columns and _same(line, cache)]
        return found[0] if found and all(line.rows == found[0].rows for line in found) else None


def _same(line: _Line, cache: Any) -> bool:
    try:
        return line.held.sources(cache, len(line.rows)) == list(range(len(line.rows)))
    except CaptureError:
        return False


def _shortened(row: Begun, columns: int) -> Begun:
    """A row without the tokens from a column on."""
    if row.end <= columns:
        return row
    lost = row.end - max(columns, row.first)
    return replace(row, position=row.position - lost, end=row.end - lost)


def as_array(tokens: Tensor) -> Int32[np.ndarray, "batch seq"]:
    """Token ids on the CPU."""
    return tokens.cpu().numpy().astype(np.int32)
