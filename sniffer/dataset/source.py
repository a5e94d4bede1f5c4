"""Datasets: where the text comes from, and the identity of each document.

A dataset yields (example_id, source_id, text). The source_id is the exact id in the data; the example_id
an integer that stands for it in every table and seeds the document's draws: the id itself where it is an
integer, else a stable 63-bit hash of it. So a document draws the same positions in every run, selection
and shard that includes it. Identities are checked before any model loads.

This file has the base and the sources whose documents are files or parts of a package; tables are in
tables.py.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import cached_property
from itertools import compress, count, islice
from typing import Any, ClassVar

from sniffer.dataset.choosing import sample
from sniffer.errors import ConfigError, DatasetError
from sniffer.hashing import stable_id
from sniffer.types import Content

LARGEST_ID = (1 << 63) - 1
END = object()

SPECIAL_TOKENS = ("auto", "add", "none")
"""As encoding.py has them."""

PACK_SEPARATORS = ("eos", "none")

LATER = {"later": True}
"""Marks fields that early releases did not have: where they say nothing, a dataset is described as it was then."""


@dataclass(frozen=True)
class Shard:
    """One worker's part: of the dataset's documents, those with number % count == index."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"dataset.shard.index={self.index} with dataset.shard.count={self.count}: "
                f"the index must be from 0 to count - 1"
            )


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """What every dataset shares; a source says what its ids are and how a row's text is read.

    `max_examples`: only so many first documents, counted before sharding; with a `shuffle_seed` so many that are drawn.
    `max_tokens`: only so many first tokens of each, cut by whoever tokenises. `window`: so many tokens make a document,
    one every `stride` tokens of a text (null: windows side by side). `min_tokens`: shorter documents are left out.
    `pack_to`: texts are joined into documents of at most so many tokens (packing.py), `pack_separator` between them:
    eos, none, or a token id. `home` is where saved runs say that its class is.
    """

    home: ClassVar[str] = "sniffer.dataset"

    never_cut: ClassVar[bool] = False
    """Whether a document that has more tokens than there may be is refused."""

    max_examples: int | None = None
    max_tokens: int | None = None
    shard: Shard = field(default_factory=Shard)
    window: int | None = field(default=None, metadata=LATER)
    stride: int | None = field(default=None, metadata=LATER)
    special_tokens: str = field(default="auto", metadata=LATER)
    min_tokens: int | None = field(default=None, metadata=LATER)
    shuffle_seed: int | None = field(default=None, metadata=LATER)
    pack_to: int | None = field(default=None, metadata=LATER)
    pack_separator: Any = field(default="eos", metadata=LATER)

    def __post_init__(self) -> None:
        for key in ("max_examples", "max_tokens", "min_tokens", "window", "stride", "pack_to"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"dataset.{key}={value} must be 1 or more, or null for no limit")
        longest = min(limit or sys.maxsize for limit in (self.window, self.max_tokens, self.pack_to))
        if (self.min_tokens or 0) > longest:
            raise ConfigError(
                f"dataset.min_tokens={self.min_tokens} is more than the {longest} that a document can have"
            )
        if self.shuffle_seed is not None and self.max_examples is None:
            given = f"dataset.shuffle_seed={self.shuffle_seed}"
            raise ConfigError(f"{given} draws the documents that dataset.max_examples counts: give both")
        self._check_packing()
        if self.special_tokens not in SPECIAL_TOKENS:
            known = ", ".join(SPECIAL_TOKENS)
            raise ConfigError(f"dataset.special_tokens={self.special_tokens} is not one of {known}")
        if self.stride is not None and self.stride > (self.window or 0):
            window = "is not set" if self.window is None else f"is {self.window}"
            raise ConfigError(
                f"dataset.stride={self.stride} with a dataset.window that {window}: tokens between windows would be "
                "lost; the stride must be at most the window, or null for windows side by side"
            )

    def _check_packing(self) -> None:
        if self.pack_to is not None and self.window is not None:
            raise ConfigError(
                f"dataset.pack_to={self.pack_to} and dataset.window={self.window} both say how long documents are: "
                "leave one out"
            )
        separator = self.pack_separator
        is_token = isinstance(separator, int) and not isinstance(separator, bool) and separator >= 0
        if not is_token and separator not in PACK_SEPARATORS:
            raise ConfigError(
                f"dataset.pack_separator={separator} is not one of {', '.join(PACK_SEPARATORS)}, or a token id"
            )

    @property
    @abstractmethod
    def title(self) -> str:
        """What messages call this dataset."""

    @abstractmethod
    def row_ids(self) -> Iterator[Any]:
        """The id of every row, in order, without reading texts where that can be avoided."""

    @abstractmethod
    def row_texts(self, rows: range) -> Iterator[Any]:
        """The text of these rows, in order."""

    @property
    def has_sections(self) -> bool:
        """Whether its documents have sections."""
        return self.pack_to is not None

    def content(self, value: Any, row: int) -> Content:
        """What a row is, as `row_texts` gave it; raises DatasetError where that cannot be."""
        require_string(value, row, self.title)
        return str(value)

    def facts(self) -> dict[str, Any]:
        """What else the manifest should record, so that a reader knows which data this was."""
        return {}

    def check(self) -> None:
        """Reads and checks every id.

        Raises:
            DatasetError: the data are missing, unreadable, empty, or an id is unusable or not unique.
        """
        _ = self._ids

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self) -> Iterator[tuple[int, str, Content]]:
        """Yields (example_id, source_id, content) in order; empty texts included.

        Raises:
            DatasetError: as `check`, or a text is not a string.
        """
        numbers, ids = self._taken
        if isinstance(numbers, range):
            texts = iter(self.row_texts(self._rows))
        else:
            texts = iter(self.some_texts([numbers[place] for place in self._rows]))
        for place in self._rows:
            text: Any = next(texts, END)
            if text is END:
                raise DatasetError(
                    f"{self.title} ends before row {numbers[place]}: it is damaged, or has changed since it was read"
                )
            yield example_id(ids[place]), str(ids[place]), self.content(text, numbers[place])

    def describe(self) -> dict[str, Any]:
        """The dataset as plain values: its class, its fields, its number of documents, its facts."""
        home = self.home if type(self).__module__.startswith("sniffer.") else type(self).__module__
        name = f"{home}.{type(self).__qualname__}"
        later = [key for key in fields(self) if key.metadata == LATER]
        says_nothing = {key.name for key in later if getattr(self, key.name) == _default(key)}
        told = {key: value for key, value in asdict(self).items() if key not in says_nothing}
        return {"_target_": name, **told, "documents": len(self), **self.facts()}

    def row_mask(self) -> Iterator[bool] | None:
        """Whether each row is one that is asked for; None where all are."""
        return None

    def some_texts(self, rows: Sequence[int]) -> Iterator[Any]:
        """As `row_texts`, of rows that are no range: unless a source knows better, it reads those between them too."""
        between = range(rows[0], rows[-1] + 1) if rows else range(0)
        wanted = set(rows)
        return compress(self.row_texts(between), (row in wanted for row in between))

    @cached_property
    def _taken(self) -> tuple[Sequence[int], Sequence[int | str]]:
        """Numbers and ids of the rows of all shards, in order."""
        mask, most = self.row_mask(), min(self.max_examples or sys.maxsize, sys.maxsize)
        if mask is None and self.shuffle_seed is None:
            ids = checked_ids(islice(self.row_ids(), most), self.title)
            rows: Sequence[int] = range(len(ids))
        else:
            pairs = self._numbered(mask)
            if self.shuffle_seed is not None:
                known = list(pairs)
                drawn = sample(((row, example_id(identity)) for row, identity in known), most, self.shuffle_seed)
                pairs = (pair for pair in known if pair[0] in drawn)
            taken = list(islice(pairs, most))
            rows = [row for row, _ in taken]
            ids = checked_ids((identity for _, identity in taken), self.title, rows)
        if not ids:
            why = "is empty: point the dataset at some text" if mask is None else "has no row that fits dataset.where"
            raise DatasetError(f"{self.title} {why}")
        return rows, ids

    def _numbered(self, mask: Iterator[bool] | None) -> Iterator[tuple[int, int | str]]:
        """Number and id of each row that is asked for."""
        numbered = enumerate(self.row_ids())
        for row, identity in numbered if mask is None else compress(numbered, mask):
            _require_usable(identity, row, self.title)
            yield row, identity

    @property
    def _ids(self) -> Sequence[int | str]:
        return self._taken[1]

    @property
    def _rows(self) -> range:
        """This shard's places among the rows that are taken."""
        n = len(self._ids)
        # Numbers beyond the last row are as good as it, and those who count by these rows know only so large ones.
        return range(min(self.shard.index, n), n, min(self.shard.count, n))


def _default(key: Field[Any]) -> Any:
    return key.default if key.default_factory is MISSING else key.default_factory()


def example_id(identity: int | str) -> int:
    """The integer in [0, 2^63) that stands for an id."""
    return identity if isinstance(identity, int) else stable_id(identity)


def checked_ids(ids: Iterator[Any], title: str, rows: Iterable[int] | None = None) -> list[int | str]:
    """The ids as a list, each of them a usable integer or string, no two with one example_id.

    Args:
        rows: their numbers, for messages; from 0 by default.

    Raises:
        DatasetError: naming the row, or the two rows.
    """
    checked: list[int | str] = []
    row_of: dict[int, tuple[int, int | str]] = {}
    for row, identity in zip(count() if rows is None else rows, ids, strict=False):
        _require_usable(identity, row, title)
        first, other = row_of.setdefault(example_id(identity), (row, identity))
        if first != row:
            raise DatasetError(_clash(other, first, identity, row, title))
        checked.append(identity)
    return checked


def require_string(text: Any, row: int, title: str) -> None:
    """Raises DatasetError where a row's text is not text; an empty one is fine."""
    if not isinstance(text, str):
        found = "null" if text is None else f"a {type(text).__name__}"
        raise DatasetError(f"row {row} of {title} has {found} where its text should be: fix that row")
    if (place := _lone_surrogate(text)) is not None:
        raise DatasetError(f"row {row} of {title} has {text[place]!r} in its text, half a character: fix that row")


def _lone_surrogate(text: str) -> int | None:
    """Where a string is no valid Unicode, which neither a tokenizer nor a file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _require_usable(identity: Any, row: int, title: str) -> None:
    if isinstance(identity, bool) or not isinstance(identity, int | str) or identity == "":
        found = "no id" if identity in (None, "") else f"the id {identity!r} ({type(identity).__name__})"
        raise DatasetError(f"row {row} of {title} has {found}: ids must be integers or non-empty strings")
    if isinstance(identity, str) and _lone_surrogate(identity) is not None:
        raise DatasetError(f"row {row} of {title} has the id {identity!r}, which is not valid Unicode: rename it")
    if isinstance(identity, int) and not 0 <= identity <= LARGEST_ID:
        raise DatasetError(f"row {row} of {title} has the id {identity}, outside [0, 2^63): store it as a string")


def _clash(first: int | str, first_row: int, second: int | str, second_row: int, title: str) -> str:
    if first == second:
        return (
            f"rows {first_row} and {second_row} of {title} both have the id {first!r}: "
            f"make ids unique, or set dataset.id_column=null to use row numbers"
        )
    return (
        f"the ids {first!r} (row {first_row}) and {second!r} (row {second_row}) of {title} "
        f"share the 63-bit example_id {example_id(first)}: rename one of them"
    )
