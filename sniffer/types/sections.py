"""Sections: which tokens of a document belong together under a name, such as user, answer or needle.

A token belongs to one section, or to none, which is written as the empty name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32

NONE = ""
"""The name where a token belongs to no section."""

LONGEST_NAME = 1024
"""Bytes of a name."""


@dataclass(frozen=True, eq=False)
class Names:
    """A section's name for each of some rows: `codes` number those of `known`, which are sorted, each there once."""

    known: tuple[str, ...]
    codes: Int32[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, which: Any) -> Names:
        return Names(self.known, self.codes[which])

    @classmethod
    def none(cls, rows: int) -> Names:
        return cls((NONE,), np.zeros(rows, dtype=np.int32))

    @classmethod
    def of(cls, known: Sequence[str], codes: Int[np.ndarray, " rows"]) -> Names:
        """From names in any order, some perhaps twice, and the place among them of each row's."""
        if list(known) == sorted(set(known)):
            return cls(tuple(known), codes.astype(np.int32))
        ordered = sorted(set(known))
        place = {name: number for number, name in enumerate(ordered)}
        return cls(tuple(ordered), np.array([place[name] for name in known], dtype=np.int32)[codes])

    @classmethod
    def from_column(cls, column: Any) -> Names:
        """From a column of texts, pyarrow's or polars'."""
        arrow = column.to_arrow() if hasattr(column, "to_arrow") else column
        if hasattr(arrow, "combine_chunks"):
            arrow = arrow.unify_dictionaries().combine_chunks()
        encoded = arrow if hasattr(arrow, "dictionary") else arrow.dictionary_encode()
        return cls.of(encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False))

    @classmethod
    def joined(cls, pieces: Sequence[Names]) -> Names:
        """One after the other."""
        known = [name for piece in pieces for name in piece.known]
        starts = np.cumsum([0, *(len(piece.known) for piece in pieces)])
        codes = [piece.codes + np.int32(start) for piece, start in zip(pieces, starts, strict=False)]
        return cls.of(known, np.concatenate([np.empty(0, np.int32), *codes]))

    @classmethod
    def joined_if_any(cls, pieces: Sequence[tuple[Names | None, int]]) -> Names | None:
        """The same, of pieces that have names or none for so many rows; None where none has."""
        if all(names is None for names, _ in pieces):
            return None
        return cls.joined([cls.none(rows) if names is None else names for names, rows in pieces])

    def same(self, other: Names) -> bool:
        return np.array_equal(self.array, other.array)

    def among(self, names: Iterable[str]) -> Bool[np.ndarray, " rows"]:
        """Whether each is one of some names."""
        wanted = set(names)
        return np.array([name in wanted for name in self.known], dtype=bool)[self.codes]

    def counts(self) -> dict[str, int]:
        """How many rows have each name that any of them has."""
        found = np.bincount(self.codes, minlength=len(self.known)).tolist()
        return {name: count for name, count in zip(self.known, found, strict=True) if count}

    @property
    def array(self) -> np.ndarray:
        """As an array of str."""
        return np.array(self.known, dtype=object)[self.codes]


@dataclass(frozen=True, eq=False)
class Sections:
    """The sections of a document's tokens, as stretches that follow one another.

    Stretch number i has the name `known[codes[i]]` and ends before token `ends[i]`; its neighbours have other names.
    `known` are sorted, and each is that of some stretch: equal sections are told in one way only.
    """

    known: tuple[str, ...]
    codes: Int32[np.ndarray, " stretches"]
    ends: Int32[np.ndarray, " stretches"]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sections):
            return NotImplemented
        alike = self.known == other.known and np.array_equal(self.codes, other.codes)
        return alike and np.array_equal(self.ends, other.ends)

    def __hash__(self) -> int:
        return hash((self.known, self.ends.tobytes()))

    def __len__(self) -> int:
        """Tokens."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @classmethod
    def of(cls, names: Names) -> Sections:
        """From a name for each token."""
        return cls.of_stretches(names.known, names.codes, np.arange(1, len(names) + 1))

    @classmethod
    def of_stretches(cls, known: Sequence[str], codes: Int[np.ndarray, " n"], ends: Int[np.ndarray, " n"]) -> Sections:
        """From stretches none of which is empty; names may be there that none has, and neighbours have the same."""
        last = np.flatnonzero(np.diff(codes, append=-1))
        used, again = np.unique(codes[last], return_inverse=True)
        names = Names.of([known[code] for code in used.tolist()], again)
        return cls(names.known, names.codes, ends[last].astype(np.int32))

    @classmethod
    def spread(cls, spans: Iterable[tuple[int, int, str]], n_tokens: int) -> Sections:
        """From (start, end, name) of tokens, which do not overlap; the others belong to none."""
        found = list(spans)
        known = sorted({NONE, *(name for *_, name in found)})
        place = {name: code for code, name in enumerate(known)}
        codes = np.full(n_tokens, place[NONE], dtype=np.int32)
        for start, end, name in found:
            codes[start:end] = place[name]
        return cls.of(Names(tuple(known), codes))

    @classmethod
    def one(cls, name: str, n_tokens: int) -> Sections:
        """All tokens in one section."""
        return cls.of(Names((name,), np.zeros(n_tokens, dtype=np.int32)))

    @classmethod
    def joined(cls, pieces: Sequence[Sections]) -> Sections:
        """Of documents one after the other."""
        return cls.of(Names.joined([piece.names for piece in pieces]))

    @classmethod
    def joined_if_any(cls, pieces: Iterable[tuple[Sections | None, int]]) -> Sections | None:
        """As `Names.joined_if_any`."""
        names = Names.joined_if_any([(None if one is None else one.names, n) for one, n in pieces])
        return None if names is None else cls.of(names)

    def at(self, positions: Int[np.ndarray, " rows"]) -> Names:
        """The names of some tokens."""
        return Names(self.known, self.codes[np.searchsorted(self.ends, positions, side="right")])

    def cut(self, start: int, end: int) -> Sections:
        """Of the tokens from `start` to `end`, counted anew."""
        return Sections.of(self.names[start:end])

    def stretches(self) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"], Names]:
        """Starts, ends and names of the stretches that belong to some section."""
        names = Names(self.known, self.codes)
        some = ~names.among([NONE])
        starts = np.concatenate([np.zeros(1, np.int32), self.ends])[:-1]
        return starts[some], self.ends[some], names[some]

    def spans(self) -> list[tuple[int, int, str]]:
        """The same, one (start, end, name) each."""
        starts, ends, names = self.stretches()
        return list(zip(starts.tolist(), ends.tolist(), names.array.tolist(), strict=True))

    @property
    def names(self) -> Names:
        """A name for each token."""
        return Names(self.known, np.repeat(self.codes, np.diff(self.ends, prepend=np.int32(0))))
