"""Documents: texts as token ids, several of them in a batch, and which of their positions are picked."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
from jaxtyping import Int32, Int64

from sniffer.types.generation import Answer, Generated
from sniffer.types.sections import Names, Sections


@dataclass(frozen=True)
class Document:
    """One tokenised text.

    `source_id` is the exact id in the data; `example_id` the 63-bit integer that stands for it in
    every table and seeds its draws. `truncated`: tokens were cut off to respect a limit. `first_position` is that of
    the first token, 0 but where a call in a notebook begins in the middle of a text. A window of a longer text has that
    text's id as its `source`, and begins at its token `offset`; None where texts are taken whole. `sections` where its
    tokens have some. Its last tokens may be `generated`: the others are their prompt.
    """

    example_id: int
    source_id: str
    token_ids: Int32[np.ndarray, " n_tokens"]
    truncated: bool
    first_position: int = 0
    source: str | None = None
    offset: int | None = None
    sections: Sections | None = None
    generated: Generated | None = None

    def __post_init__(self) -> None:
        assert self.sections is None or len(self.sections) == len(self.token_ids), "sections of other tokens"

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    def continued(self, generated: Generated, answer: Answer) -> Document:
        """This prompt with what a model has written after it; the sections of that are as `answer` has them."""
        names = answer.names(self.token_ids.tolist(), generated.token_ids.tolist())
        sections = None if self.sections is None else Sections.joined([self.sections, Sections.of(names)])
        token_ids = np.concatenate([self.token_ids, generated.token_ids]).astype(np.int32)
        return replace(self, token_ids=token_ids, sections=sections, generated=generated)


@dataclass(frozen=True)
class TokenBatch:
    """Documents that go through the backbone together, padded on the right to the longest."""

    documents: tuple[Document, ...]
    pad_id: int

    @property
    def seq_len(self) -> int:
        return max(document.n_tokens for document in self.documents)

    @property
    def n_tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(document.n_tokens for document in self.documents)

    @property
    def n_rows(self) -> int:
        """A row each document; calls in a notebook may hold several in one."""
        return len(self.documents)

    @property
    def padded_tokens(self) -> int:
        return self.n_rows * self.seq_len

    def input_ids(self) -> Int64[np.ndarray, "batch seq"]:
        ids = np.full((len(self.documents), self.seq_len), self.pad_id, dtype=np.int64)
        for row, document in enumerate(self.documents):
            ids[row, : document.n_tokens] = document.token_ids
        return ids

    def cells(self, picks: Picks) -> Int32[np.ndarray, " picks"]:
        """Where picks lie in the batch: row * seq + column."""
        return picks.rows * np.int32(self.seq_len) + picks.positions

    def tokens(self, picks: Picks) -> Int32[np.ndarray, " picks"]:
        """The token ids at picks."""
        starts = np.cumsum([0] + [document.n_tokens for document in self.documents[:-1]])
        tokens = np.concatenate([document.token_ids for document in self.documents])
        return tokens[starts[picks.rows] + picks.positions].astype(np.int32)

    def sections(self, picks: Picks) -> Names | None:
        """The sections at picks; None where no document has any."""
        if all(document.sections is None for document in self.documents):
            return None
        # Picks are ordered by row.
        ends = np.searchsorted(picks.rows, np.arange(len(self.documents) + 1))
        pieces = []
        for document, first, last in zip(self.documents, ends, ends[1:], strict=False):
            positions, sections = picks.positions[first:last] - document.first_position, document.sections
            pieces.append(Names.none(len(positions)) if sections is None else sections.at(positions))
        return Names.joined(pieces)


@dataclass(frozen=True)
class Picks:
    """The positions of one batch that one draw keeps, ordered by (row, position).

    `rows` says which document of the batch each pick is from. All heads of the draw's layer and
    kinds share them.
    """

    rows: Int32[np.ndarray, " picks"]
    positions: Int32[np.ndarray, " picks"]
    buckets: Int32[np.ndarray, " picks"]

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class LengthClasses:
    """Which lengths a model treats alike, so that documents of these lengths may share a batch.

    A forward is as long as its longest document, and some models turn positions by other angles in a long one.

    Attributes:
        breaks: the lengths at which another class begins, ascending.
        apart_from: from this length on, each length is a class of its own; None if none is.
    """

    breaks: tuple[int, ...] = ()
    apart_from: int | None = None

    def of(self, length: int) -> tuple[int, int]:
        """The class of a length: equal for lengths that are treated alike."""
        apart = self.apart_from is not None and length >= self.apart_from
        return bisect_right(self.breaks, length), length if apart else 0

    def as_json(self) -> dict[str, Any]:
        """As plain values; empty where all lengths are alike."""
        apart = {} if self.apart_from is None else {"apart_from": self.apart_from}
        return ({"breaks": list(self.breaks)} if self.breaks else {}) | apart


@dataclass(frozen=True)
class Chat:
    """A conversation, yet to be rendered: by the tokenizer's own template, or by one that is given or named.

    `thinking` is what templates with such a switch are told, if anything; `continue_final` leaves the last message
    open; `prompts` adds what an answer of the assistant begins with. `spans`: of each message those of its content that
    have sections of their own, in order, as a `SectionedText` has them; else all of it is its role's.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    template: str | None = None
    thinking: bool | None = None
    continue_final: bool = False
    spans: tuple[tuple[tuple[int, int, str], ...], ...] | None = None
    prompts: bool = False


@dataclass(frozen=True)
class SectionedText:
    """A text with sections: (first character, the one after the last, name), in order, without overlaps."""

    text: str
    spans: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class SectionedTokens:
    """Token ids with sections."""

    token_ids: Int32[np.ndarray, " n_tokens"]
    sections: Sections


Content: TypeAlias = str | Int32[np.ndarray, " n_tokens"] | Chat | SectionedText | SectionedTokens
"""What a dataset has of a document: a text, its token ids, or a chat; with sections, where it says that it has some
(an attribute `has_sections`)."""


class Dataset(Protocol):
    """Texts that can be read: what `config.dataset` builds."""

    @property
    def max_tokens(self) -> int | None:
        """Tokens to keep of each text; None for as many as the model takes."""

    def __len__(self) -> int: ...

    def check(self) -> None:
        """Meets everything that can be known to be wrong without reading all texts; raises DatasetError."""

    def texts(self) -> Iterator[tuple[int, str, Content]]:
        """Yields (example_id, source_id, content) in order; empty texts included."""

    def describe(self) -> dict[str, Any]: ...


def has_sections(dataset: Dataset, *, generates: bool = False) -> bool:
    """Whether documents of a dataset have sections; one of a user's own may not say. Continued ones always have."""
    return generates or bool(getattr(dataset, "has_sections", False))


def described(dataset: Dataset, *, generates: bool = False) -> dict[str, Any]:
    """What the manifest records of a dataset: what it says of itself, and whether its documents have sections."""
    return {**dataset.describe(), **({"sections": True} if has_sections(dataset, generates=generates) else {})}
