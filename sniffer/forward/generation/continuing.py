"""The prompts of a batch, and what a model writes after them.

Prompts are padded on the left, so that the tokens that come next are side by side, and positions count from the first
token of each. A row whose text has ended goes on with padding, which nobody looks at, until all have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from jaxtyping import Int64

from sniffer.errors import CaptureError
from sniffer.forward.generation.choosing import next_tokens
from sniffer.forward.generation.live import Live
from sniffer.forward.generation.request import Continuing
from sniffer.process.clock import Clock
from sniffer.types import Document, Generated, LanguageModel, LengthClasses, TokenBatch

Decode = Callable[[list[int]], str]

BEYOND = 4
"""Tokens that a text is looked for in, beyond its bytes: some stand for nothing."""


@torch.inference_mode()
def continued(
    model: LanguageModel,
    batch: TokenBatch,
    plan: Continuing,
    lengths: LengthClasses,
    decode: Decode,
    clock: Clock,
    live: Live | None = None,
) -> TokenBatch:
    """The documents of a batch with what the model writes after them.

    Args:
        lengths: which lengths the model treats alike.
        decode: token ids to text, for `generate.stop`.
        clock: gets the seconds of `prefill`, over the prompts, and of `decode`.
        live: gathers meanwhile; then the last token of each text goes through the model too.

    Raises:
        CaptureError: a document may become so long that the model would treat its prompt otherwise.
    """
    for document in batch.documents:
        require_one_class(document, plan.how.max_new_tokens, lengths)
    texts, most = Texts(batch, plan, decode, clock, live), plan.how.max_new_tokens
    with nullcontext() if live is None else live.open():
        model.generate(*left_padded(batch), texts.choose, most if live is None else most + 1)
    return texts.batch()


def require_one_class(document: Document, new_tokens: int, lengths: LengthClasses) -> None:
    """Raises CaptureError where a model turns positions by other angles once a document has its last tokens."""
    longest = document.n_tokens + new_tokens
    if lengths.of(document.n_tokens) != lengths.of(longest):
        raise CaptureError(
            f"document {document.source_id!r} has {document.n_tokens:,} tokens and may come to {longest:,}, for which "
            "this model turns positions by other angles, so that keys in its cache would no longer be right: lower "
            "generate.max_new_tokens or dataset.max_tokens, or take prompts that are all longer than that"
        )


def left_padded(batch: TokenBatch) -> tuple[Int64[np.ndarray, "batch seq"], Int64[np.ndarray, "batch seq"]]:
    """Token ids and mask, 1 for tokens, of prompts that all end in the last column."""
    ids = np.full((len(batch.documents), batch.seq_len), batch.pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, document in enumerate(batch.documents):
        ids[row, batch.seq_len - document.n_tokens :] = document.token_ids
        mask[row, batch.seq_len - document.n_tokens :] = 1
    return ids, mask


class Texts:
    """What is being written, a row each. `ends` says why, of those that have ended."""

    def __init__(
        self, prompts: TokenBatch, plan: Continuing, decode: Decode, clock: Clock, live: Live | None = None
    ) -> None:
        self.prompts = prompts
        self._live = live
        self.tokens: list[list[int]] = [[] for _ in prompts.documents]
        self.ends: list[str | None] = [None for _ in prompts.documents]
        self._plan, self._decode, self._clock = plan, decode, clock
        self._tail = max((len(text.encode()) for text in plan.how.stop), default=0) + BEYOND
        self._stage, self._since = "prefill", time.perf_counter()
        self._step = 0

    def choose(self, logits: torch.Tensor) -> Int64[np.ndarray, " batch"] | None:
        """The next token of each row; None once all have ended, and nothing more is wanted of their last tokens."""
        if self._live is not None:
            self._live.advance([len(written) for written in self.tokens])
        if self._ended:
            return self._timed(None)
        chosen = next_tokens(logits, self._plan.how, self.prompts.documents, self._step)
        self._step += 1
        for row, end in enumerate(self.ends):
            if end is None:
                self.write(row, int(chosen[row]))
            else:
                chosen[row] = self.prompts.pad_id
        if not self._ended or (self._live is not None and self._live.waits):
            return self._timed(chosen)
        return self._timed(None)

    def write(self, row: int, token: int) -> None:
        """The next token of a text that has not ended."""
        self.tokens[row].append(token)
        self.ends[row] = self._end_of(self.tokens[row])

    def _timed(self, chosen: Int64[np.ndarray, " batch"] | None) -> Int64[np.ndarray, " batch"] | None:
        now = time.perf_counter()
        self._clock.add(self._stage, now - self._since)
        self._stage, self._since = "decode", now
        return chosen

    @property
    def _ended(self) -> bool:
        return all(end is not None for end in self.ends)

    def batch(self) -> TokenBatch:
        """The documents with their texts; raises CaptureError where the model has ended before them."""
        if any(end is None for end in self.ends):
            raise CaptureError("the model has ended before its texts did: this is an error of ours, please report it")
        both = zip(self.prompts.documents, self.tokens, self.ends, strict=True)
        answer = self._plan.answer
        documents = (
            document.continued(Generated(np.array(tokens, dtype=np.int32), str(end)), answer)
            for document, tokens, end in both
        )
        return TokenBatch(tuple(documents), self.prompts.pad_id)

    def _end_of(self, tokens: Sequence[int]) -> str | None:
        if tokens[-1] in self._plan.eos:
            return "eos"
        if self._plan.how.stop:
            text = self._decode(list(tokens[-self._tail :]))
            if any(stop in text for stop in self._plan.how.stop):
                return "stop"
        return "length" if len(tokens) == self._plan.how.max_new_tokens else None
