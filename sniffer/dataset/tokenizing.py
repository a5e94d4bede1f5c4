"""From texts to documents of token ids, ahead of the model in a thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from sniffer.errors import DatasetError
from sniffer.limits import TOKENS
from sniffer.types import Dataset, Document, Tokenize


@dataclass
class ReadCounts:
    """What happened to the documents read so far."""

    examples: int = 0
    skipped_empty: int = 0
    truncated: int = 0
    tokens: int = 0


@dataclass
class Tokenizer:
    """Turns texts into documents, counting what it skips and cuts."""

    tokenize: Tokenize
    max_tokens: int | None
    counts: ReadCounts = field(default_factory=ReadCounts)

    def documents(self, dataset: Dataset) -> Iterator[Document]:
        for example_id, source_id, text in dataset.texts():
            token_ids = np.asarray(self.tokenize(text), dtype=np.int32) if text.strip() else np.empty(0, np.int32)
            if not len(token_ids):
                self.counts.skipped_empty += 1
                continue
            truncated = self.max_tokens is not None and len(token_ids) > self.max_tokens
            kept = token_ids[: self.max_tokens].copy() if truncated else token_ids
            if len(kept) > TOKENS:
                raise DatasetError(
                    f"document {source_id!r} has {len(kept):,} tokens, more than the {TOKENS:,} that one can have: "
                    "set dataset.max_tokens"
                )
            self.counts.examples += 1
            self.counts.truncated += truncated
            self.counts.tokens += len(kept)
            yield Document(example_id, source_id, kept, truncated)
