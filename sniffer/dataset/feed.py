"""From texts to batches: tokenisation ahead of the model, and batches with little padding.

A background thread reads and tokenises chunks of documents while the model loads and runs. Within a
chunk documents are sorted by length and packed, longest first, so that a batch stays within the token
budget and pads by no more than a twentieth; documents of lengths that the model treats differently are kept apart.
What is captured does not depend on any of this.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from sniffer.dataset.batching import ALL_ALIKE, batches
from sniffer.dataset.encoding import Encoder
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import CheckpointError, DatasetError
from sniffer.types import NONE, Dataset, Document, LengthClasses, TokenBatch, Tokenize

CHUNK_TOKENS = 1 << 23
CHUNK_DOCUMENTS = 4096


@dataclass(frozen=True)
class Chunk:
    """Documents that are batched together; `last` when the dataset ends with them."""

    documents: tuple[Document, ...]
    last: bool


def chunks(documents: Iterator[Document], breaks: Collection[int] = ()) -> Iterator[Chunk]:
    """Groups documents into chunks of bounded size; always ends with one marked `last`.

    Args:
        breaks: numbers of documents after which a chunk ends, however small it is.
    """
    pending: list[Document] = []
    tokens = 0
    for number, document in enumerate(documents):
        full = tokens + document.n_tokens > CHUNK_TOKENS or len(pending) >= CHUNK_DOCUMENTS
        if pending and (full or number in breaks):
            yield Chunk(tuple(pending), last=False)
            pending, tokens = [], 0
        pending.append(document)
        tokens += document.n_tokens
    yield Chunk(tuple(pending), last=True)


class Feed:
    """A run's documents: reading starts at once, in the background; batches come chunk by chunk.

    `counts` is complete when the batches have ended. No batch has documents from before and after one of `breaks`.
    `new_tokens`: a model goes on with each document by so many, at most.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenize: Tokenize,
        pad_id: int,
        *,
        max_tokens: int | None,
        breaks: Collection[int] = (),
        new_tokens: int = 0,
    ) -> None:
        tokenizer = Tokenizer(tokenize, max_tokens)
        self.counts = tokenizer.counts
        self.encoder = Encoder.of(dataset, tokenize, prompts=bool(new_tokens))
        self.pad_id = pad_id
        self.new_tokens = new_tokens
        self._ahead = Ahead(chunks(tokenizer.encoded(dataset, self.encoder), frozenset(breaks)))
        self._chunks = iter(self._ahead)
        self._n_texts = len(dataset)
        self._packs = getattr(dataset, "pack_to", None) is not None
        self._vocabulary: int | None = None

    def fit(self, vocabulary: int) -> None:
        """Makes batches for a model whose embedding has so many rows.

        A tokenizer's pad token may have none of them. Any other serves: padding comes last, where causal attention
        does not see it.

        Raises:
            CheckpointError: a token of the first chunk has no row either; of later ones, when their batches come.
        """
        self._vocabulary = vocabulary
        if not 0 <= self.pad_id < vocabulary:
            self.pad_id = 0
        self._check(self.first)

    @cached_property
    def first(self) -> Chunk:
        """The first chunk, from which the size of the run is told; waits until it is read."""
        return next(self._chunks)

    @property
    def expected_documents(self) -> int:
        """How many documents there will be: exact once the last chunk is read, else about this.

        Where texts come in windows, those to come are expected to have as many each as the first ones; packed ones to
        be as many in a document.
        """
        documents = self.first.documents
        if self.first.last:
            return len(documents)
        texts = len({document.source for document in documents if document.source is not None})
        if self._packs:
            texts = sum(len({*document.sections.known} - {NONE}) for document in documents if document.sections)
        skipped = self.counts.skipped_empty + (0 if texts else self.counts.skipped_short)
        return (self._n_texts - skipped) * len(documents) // (texts or len(documents))

    @property
    def expected_tokens(self) -> float:
        """Tokens in all, scaled up from the first chunk where that is not the last."""
        read = sum(document.n_tokens for document in self.first.documents)
        return read * self.expected_documents / max(1, len(self.first.documents))

    def batches(self, max_tokens: int, lengths: LengthClasses = ALL_ALIKE) -> Iterator[TokenBatch]:
        """All documents in batches of at most `max_tokens` computed tokens; to be called once.

        Args:
            lengths: which documents the model treats alike.
        """
        for chunk in chain([self.first], self._chunks):
            self._check(chunk)
            yield from batches(chunk.documents, max_tokens, self.pad_id, lengths, self.new_tokens)

    def close(self) -> None:
        """Stops reading; nothing more is needed."""
        self._ahead.close()

    def _check(self, chunk: Chunk) -> None:
        rows = math.inf if self._vocabulary is None else self._vocabulary
        for document in chunk.documents:
            for place in (int(document.token_ids.argmax()), int(document.token_ids.argmin())):
                if not 0 <= (token := int(document.token_ids[place])) < rows:
                    raise CheckpointError(
                        f"document {document.source_id!r} has token {token} at position {place}, but the model's "
                        f"embedding has {rows} rows: the ids must be of the tokenizer that it was trained with"
                    )


class Ahead:
    """Chunks made in a background thread, at most one ahead of the reader.

    An exception in the thread is raised where the reader iterates. One that is no Exception, such as a panic in a
    library written in Rust, is raised as a DatasetError: it must not pass by those who save what was captured.
    """

    def __init__(self, source: Iterator[Chunk]) -> None:
        self._queue: queue.Queue[Chunk | BaseException] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(source,), name="tokenizer", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, BaseException):
                raise DatasetError(f"reading the text failed: {type(item).__name__}: {item}") from item
            yield item
            if item.last:
                return

    def close(self) -> None:
        """Stops reading; nothing more is needed."""
        self._closed.set()

    def _fill(self, source: Iterator[Chunk]) -> None:
        try:
            for chunk in source:
                self._put(chunk)
                if self._closed.is_set():
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Chunk | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
