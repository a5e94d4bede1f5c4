"""From texts to documents of token ids, ahead of the model in a thread.

A text is one document, cut where it is too long; or, where the dataset has a `window`, it is as many as there are
windows in it, each a document of its own. The first of them is the document that the text would be when cut to a
window: it has the same identity, and so the same positions are drawn of it. With `pack_to`, several make up one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int32

from sniffer.dataset.encoding import Encoder
from sniffer.dataset.packing import dealt, packed, packs
from sniffer.errors import DatasetError
from sniffer.hashing import key_of
from sniffer.limits import TOKENS
from sniffer.types import Chat, Dataset, Document, Tokenize


@dataclass
class ReadCounts:
    """What happened to the texts read so far.

    `skipped_short`: documents with fewer tokens than the dataset's `min_tokens`. `dropped`: tokens that were cut off.
    `begun`: texts that brought a beginning of their own (encoding.py).
    """

    examples: int = 0
    skipped_empty: int = 0
    truncated: int = 0
    tokens: int = 0
    skipped_short: int = 0
    dropped: int = 0
    begun: int = 0

    def leave_out(self, now: ReadCounts, before: ReadCounts, counts: bool) -> None:
        """Adds what was left out since, if it `counts`."""
        for name in ("skipped_empty", "skipped_short", "dropped", "begun", "truncated"):
            setattr(self, name, getattr(self, name) + counts * (getattr(now, name) - getattr(before, name)))

    def left_out(self) -> dict[str, int]:
        """For the manifest: what is in no document. Runs that leave nothing out say so as early releases did."""
        counts = {"skipped_short": self.skipped_short, "dropped": self.dropped, "begun": self.begun}
        return {"skipped_empty": self.skipped_empty} | {name: count for name, count in counts.items() if count}


@dataclass
class Tokenizer:
    """Turns texts into documents, counting what it skips and cuts. `max_tokens`: of a text."""

    tokenize: Tokenize
    max_tokens: int | None
    counts: ReadCounts = field(default_factory=ReadCounts)

    def documents(self, dataset: Dataset) -> Iterator[Document]:
        """The documents of a dataset, lazily.

        Raises:
            CheckpointError: at once, if the tokenizer cannot do what the dataset asks for.
        """
        return self.encoded(dataset, Encoder.of(dataset, self.tokenize))

    def encoded(self, dataset: Dataset, encoder: Encoder) -> Iterator[Document]:
        """The same, by an encoder that is there.

        Raises:
            CheckpointError: at once, if there is no separator for texts that are packed.
        """
        # A dataset of a user's own may not have these keys.
        if (longest := getattr(dataset, "pack_to", None)) is not None:
            separator = encoder.separator(getattr(dataset, "pack_separator", "eos"))
            return self._packed(dataset, encoder, longest, separator)
        return (self._counted(document) for document in self._read(dataset, encoder))

    def _packed(self, dataset: Dataset, encoder: Encoder, longest: int, separator: int | None) -> Iterator[Document]:
        whole, shard = dealt(dataset)
        reading = Tokenizer(self.tokenize, min(longest, self.max_tokens or longest))
        known, mine = replace(reading.counts), shard.index == 0
        for number, texts in enumerate(packs(reading._read(whole, encoder), longest, separator)):
            # What was left out on the way to a document is counted by the shard that has it.
            self.counts.leave_out(reading.counts, known, mine)
            known, mine = replace(reading.counts), number % shard.count == shard.index
            if mine:
                yield self._counted(packed(texts, separator))
        self.counts.leave_out(reading.counts, known, mine)

    def _read(self, dataset: Dataset, encoder: Encoder) -> Iterator[Document]:
        """Texts or their windows, each a document."""
        window, stride = getattr(dataset, "window", None), getattr(dataset, "stride", None)
        least = getattr(dataset, "min_tokens", None) or 0
        for example_id, source_id, content in dataset.texts():
            token_ids, sections = encoder.encoded(content, source_id)
            self.counts.begun = encoder.begun
            if not len(token_ids):
                self.counts.skipped_empty += 1
                continue
            truncated = self.max_tokens is not None and len(token_ids) > self.max_tokens
            if truncated and getattr(dataset, "never_cut", False):
                raise DatasetError(
                    f"document {source_id!r} has {len(token_ids):,} tokens, more than the {self.max_tokens:,} that it "
                    "may have, and would lose its end if it were cut: make it shorter (dataset.lengths)"
                )
            if truncated and encoder.prompts and isinstance(content, Chat):
                raise DatasetError(
                    f"document {source_id!r} has {len(token_ids):,} tokens, more than the {self.max_tokens:,} that "
                    "leave room for an answer, and would lose its question if it were cut: leave it out, or lower "
                    "generate.max_new_tokens"
                )
            kept = token_ids[: self.max_tokens].copy() if truncated else token_ids
            self.counts.truncated += truncated
            self.counts.dropped += len(token_ids) - len(kept)
            cut = None if sections is None else sections.cut(0, len(kept))
            whole = Document(example_id, source_id, kept, truncated, sections=cut)
            for document in [whole] if window is None else windows(whole, window, stride or window):
                if document.n_tokens < least:
                    self.counts.skipped_short += 1
                else:
                    yield document

    def _counted(self, document: Document) -> Document:
        if document.n_tokens > TOKENS:
            raise DatasetError(
                f"document {document.source_id!r} has {document.n_tokens:,} tokens, more than the {TOKENS:,} that one "
                "can have: set dataset.max_tokens or dataset.window"
            )
        self.counts.examples += 1
        self.counts.tokens += document.n_tokens
        return document


def spans(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Where the windows of a text begin and end: one every `stride` tokens, until one reaches the end."""
    # Of 10 tokens, windows of 4 every 3: 0-4, 3-7, 6-10. One more would have no token that these have not.
    for start in range(0, max(1, n_tokens - window + stride), stride):
        yield start, min(start + window, n_tokens)


def windows(text: Document, window: int, stride: int) -> Iterator[Document]:
    """The windows of a text, each a document, whose identity follows from the text's and its offset.

    Raises:
        DatasetError: the text's own id reads like that of a window.
    """
    _, mark, number = text.source_id.rpartition("@")
    if mark and number.isdecimal():
        raise DatasetError(
            f"document {text.source_id!r}: its id ends as ids of windows do, and could be taken for one: change "
            "it, or leave dataset.window out"
        )
    for start, end in spans(text.n_tokens, window, stride):
        example_id = text.example_id if start == 0 else window_id(text.example_id, start)
        source_id = text.source_id if start == 0 else f"{text.source_id}@{start}"
        tokens: Int32[np.ndarray, " tokens"] = text.token_ids[start:end]
        cut = text.truncated and end == text.n_tokens
        sections = None if text.sections is None else text.sections.cut(start, end)
        yield Document(example_id, source_id, tokens, cut, source=text.source_id, offset=start, sections=sections)


def window_id(example_id: int, offset: int) -> int:
    """The 63-bit integer that stands for a window that begins later than its text."""
    return key_of("window", example_id, offset) >> 1
