"""Documents of about one length share a forward pass, padded to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sniffer.types import Document, LengthClasses, TokenBatch

ON_CPU, ELSEWHERE = 2048, 8192
"""Padded tokens per forward by default. A processor gains nothing from more: states then outgrow its caches."""

MAX_PADDING = 1.05
"""Computed tokens over real tokens, at most, in a batch of several documents."""

PROMPT_PADDING = 2.0
"""The same where a model goes on with documents: a step costs about as much for one row as for many."""

ALL_ALIKE = LengthClasses()


def batches(
    documents: Sequence[Document], max_tokens: int, pad_id: int, lengths: LengthClasses = ALL_ALIKE, new_tokens: int = 0
) -> Iterator[TokenBatch]:
    """Packs documents, longest first, into batches of at most `max_tokens` computed tokens.

    A document longer than `max_tokens` gets a batch of its own. All documents of a batch are of one class of
    `lengths`: the model treats each as it would alone. To each come up to `new_tokens` that the model writes.
    """
    pending: list[Document] = []
    for document in sorted(documents, key=lambda document: (-document.n_tokens, document.example_id)):
        alike = not pending or lengths.of(document.n_tokens) == lengths.of(pending[0].n_tokens)
        if pending and not (alike and _fits(pending, document, max_tokens, new_tokens)):
            yield TokenBatch(tuple(pending), pad_id)
            pending = []
        pending.append(document)
    if pending:
        yield TokenBatch(tuple(pending), pad_id)


def batch_tokens(wanted: int | None, device_type: str) -> int:
    """The budget of padded tokens per forward: what the user says, else what suits the device."""
    return wanted or (ON_CPU if device_type == "cpu" else ELSEWHERE)


def _fits(pending: Sequence[Document], document: Document, max_tokens: int, new_tokens: int) -> bool:
    rows = len(pending) + 1
    computed = rows * (pending[0].n_tokens + new_tokens)
    real = sum(other.n_tokens for other in pending) + document.n_tokens + rows * new_tokens
    return computed <= max_tokens and computed <= (PROMPT_PADDING if new_tokens else MAX_PADDING) * real
