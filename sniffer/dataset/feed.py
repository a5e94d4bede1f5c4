"""From texts to batches: tokenisation ahead of the model, and batches with little padding.

A background thread reads and tokenises windows of documents while the model loads and runs. Within a
window documents are sorted by length and packed, longest first, so that a batch stays within the token
budget and pads by no more than a twentieth; documents of lengths that the model treats differently are kept apart.
What is captured does not depend on any of this.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from sniffer.dataset.batching import ALL_ALIKE, batches
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import CheckpointError, DatasetError
from sniffer.types import Dataset, Document, LengthClasses, TokenBatch, Tokenize

WINDOW_TOKENS = 1 << 23
WINDOW_DOCUMENTS = 4096


@dataclass(frozen=True)
class Window:
    """Documents that are batched together; `last` when the dataset ends with them."""

    documents: tuple[Document, ...]
    last: bool


def windows(documents: Iterator[Document]) -> Iterator[Window]:
    """Groups documents into windows of bounded size; always ends with one marked `last`."""
    pending: list[Document] = []
    tokens = 0
    for document in documents:
        if pending and (tokens + document.n_tokens > WINDOW_TOKENS or len(pending) >= WINDOW_DOCUMENTS):
            yield Window(tuple(pending), last=False)
            pending, tokens = [], 0
        pending.append(document)
        tokens += document.n_tokens
    yield Window(tuple(pending), last=True)


class Feed:
    """A run's documents: reading starts at once, in the background; batches come window by window.

    `counts` is complete when the batches have ended.
    """

    def __init__(self, dataset: Dataset, tokenize: Tokenize, pad_id: int, *, max_tokens: int | None) -> None:
        tokenizer = Tokenizer(tokenize, max_tokens)
        self.counts = tokenizer.counts
        self.pad_id = pad_id
        self._ahead = Ahead(windows(tokenizer.documents(dataset)))
        self._windows = iter(self._ahead)
        self._n_texts = len(dataset)
        self._vocabulary: int | None = None

    def fit(self, vocabulary: int) -> None:
        """Makes batches for a model whose embedding has so many rows.

        A tokenizer's pad token may have none of them. Any other serves: padding comes last, where causal attention
        does not see it.

        Raises:
            CheckpointError: a token of the first window has no row either; of later ones, when their batches come.
        """
        self._vocabulary = vocabulary
        if not 0 <= self.pad_id < vocabulary:
            self.pad_id = 0
        self._check(self.first)

    @cached_property
    def first(self) -> Window:
        """The first window, from which the size of the run is told; waits until it is read."""
        return next(self._windows)

    @property
    def expected_documents(self) -> int:
        """How many documents there will be: exact once the last window is read, else at most this."""
        if self.first.last:
            return len(self.first.documents)
        return self._n_texts - self.counts.skipped_empty

    @property
    def expected_tokens(self) -> float:
        """Tokens in all, scaled up from the first window where that is not the last."""
        read = sum(document.n_tokens for document in self.first.documents)
        return read * self.expected_documents / max(1, len(self.first.documents))

    def batches(self, max_tokens: int, lengths: LengthClasses = ALL_ALIKE) -> Iterator[TokenBatch]:
        """All documents in batches of at most `max_tokens` computed tokens; to be called once.

        Args:
            lengths: which documents the model treats alike.
        """
        for window in chain([self.first], self._windows):
            self._check(window)
            yield from batches(window.documents, max_tokens, self.pad_id, lengths)

    def close(self) -> None:
        """Stops reading; nothing more is needed."""
        self._ahead.close()

    def _check(self, window: Window) -> None:
        rows = math.inf if self._vocabulary is None else self._vocabulary
        for document in window.documents:
            for place in (int(document.token_ids.argmax()), int(document.token_ids.argmin())):
                if not 0 <= (token := int(document.token_ids[place])) < rows:
                    raise CheckpointError(
                        f"document {document.source_id!r} has token {token} at position {place}, but the model's "
                        f"embedding has {rows} rows: the checkpoint needs the tokenizer that it was trained with"
                    )


class Ahead:
    """Windows made in a background thread, at most one ahead of the reader.

    An exception in the thread is raised where the reader iterates. One that is no Exception, such as a panic in a
    library written in Rust, is raised as a DatasetError: it must not pass by those who save what was captured.
    """

    def __init__(self, source: Iterator[Window]) -> None:
        self._queue: queue.Queue[Window | BaseException] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(source,), name="tokenizer", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Window]:
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

    def _fill(self, source: Iterator[Window]) -> None:
        try:
            for window in source:
                self._put(window)
                if self._closed.is_set():
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Window | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
