"""Short texts packed into documents: one after the other, as many as fit, each a section of its document.

The model reads a document of several texts as one: later ones see those before them, and positions go on. Its identity
follows from those of its texts, so that it draws the same positions whichever dataset brings them together; one text
alone is the document that it would be. Texts are packed in their order, before documents are dealt out to shards:
a shard has some of the documents that there are without shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from sniffer.dataset.source import Shard, Source
from sniffer.dataset.spans import Span, check_name
from sniffer.errors import DatasetError
from sniffer.hashing import key_of
from sniffer.types import Dataset, Document, Sections


def packs(texts: Iterable[Document], longest: int, separator: int | None) -> Iterator[list[Document]]:
    """Texts in their order, as many together as have at most `longest` tokens with separators; none is longer alone."""
    pending: list[Document] = []
    tokens = 0
    for text in texts:
        between = _separator_after(pending[-1], separator) if pending else 0
        if pending and tokens + between + text.n_tokens > longest:
            yield pending
            pending, tokens, between = [], 0, 0
        pending.append(text)
        tokens += between + text.n_tokens
    if pending:
        yield pending


def packed(texts: Sequence[Document], separator: int | None) -> Document:
    """One document of some texts; separators between them belong to no section.

    Raises:
        DatasetError: a text's own id reads like that of a document of several, or cannot name a section.
    """
    for text in texts:
        check_name(text.source_id, f"document {text.source_id!r:.60}")
        _, mark, number = text.source_id.rpartition("+")
        if mark and number.isdecimal():
            raise DatasetError(
                f"document {text.source_id!r}: its id ends as ids of packed texts do, and could be taken for one: "
                "change it, or leave dataset.pack_to out"
            )
    tokens: list[np.ndarray] = []
    spans: list[Span] = []
    begin = 0
    for place, text in enumerate(texts):
        spans.append((begin, begin + text.n_tokens, text.source_id))
        between = _separator_after(text, separator) if place + 1 < len(texts) else 0
        tokens += [text.token_ids, np.full(between, separator or 0, dtype=np.int32)]
        begin += text.n_tokens + between
    first, more = texts[0], len(texts) - 1
    return Document(
        example_id=first.example_id if not more else pack_id([text.example_id for text in texts]),
        source_id=first.source_id if not more else f"{first.source_id}+{more}",
        token_ids=np.concatenate(tokens),
        truncated=any(text.truncated for text in texts),
        sections=Sections.spread(spans, begin),
    )


def pack_id(example_ids: Sequence[int]) -> int:
    """The 63-bit integer that stands for a document of several texts."""
    return key_of("pack", *example_ids) >> 1


def dealt(dataset: Dataset) -> tuple[Dataset, Shard]:
    """A dataset without its shard, whose texts are all to be packed, and the shard."""
    shard = getattr(dataset, "shard", Shard())
    if shard.count == 1:
        return dataset, shard
    if not isinstance(dataset, Source):
        raise DatasetError("dataset.pack_to with shards needs a dataset class made from sniffer.dataset.Source")
    return replace(dataset, shard=Shard()), shard


def most_lengths(texts: int, longest: int, pack_to: int) -> list[int]:
    """The lengths of the documents that so many texts make, each of `longest` tokens and then a separator."""
    each = min(longest, pack_to)
    together = max(1, (pack_to + 1) // (each + 1))
    whole, rest = divmod(texts, together)
    return [n * each + n - 1 for n in [*[together] * whole, *([rest] if rest else [])]]


def _separator_after(text: Document, separator: int | None) -> int:
    """How many tokens come between a text and the next: none where it ends with the separator."""
    return 0 if separator is None or text.token_ids[-1] == separator else 1
