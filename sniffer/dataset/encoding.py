"""What a row holds as the token ids that go through the model, special tokens as the dataset wants them.

`auto` has what the model's tokenizer adds, `add` a token of the beginning also where it adds none, `none` nothing. A
text that brings a beginning of its own, such as a chat rendered to text, gets no second one: the first position is where
attention sinks are, and no model was trained with two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from sniffer.errors import CheckpointError
from sniffer.types import Dataset, Tokenize


@dataclass
class Encoder:
    """From texts to token ids.

    `begun`: texts so far that brought a beginning of their own, and would have got a second one.
    """

    tokenize: Tokenize
    special_tokens: str = "auto"
    begun: int = 0

    def __post_init__(self) -> None:
        if self.special_tokens != "auto":
            self._asked("without_special", f"dataset.special_tokens={self.special_tokens}")
        if self.special_tokens == "add" and self._beginning is None:
            raise CheckpointError("dataset.special_tokens=add: the model's tokenizer has no token for a beginning")

    @classmethod
    def of(cls, dataset: Dataset, tokenize: Tokenize) -> Encoder:
        """As the dataset wants it; one of a user's own may not have the key."""
        return cls(tokenize, getattr(dataset, "special_tokens", "auto"))

    def ids(self, text: str) -> Int32[np.ndarray, " n_tokens"]:
        return np.asarray(self._of_text(text), dtype=np.int32)

    def _of_text(self, text: str) -> Any:
        if not text.strip():
            return ()
        if self.special_tokens == "none":
            return self._asked("without_special", "dataset.special_tokens=none")(text)
        ids, beginning = self.tokenize(text), self._beginning
        if beginning is None:
            return ids
        if list(ids[:2]) == [beginning, beginning] and self._adds_one(text, len(ids)):
            self.begun += 1
            return ids[1:]
        lacks = self.special_tokens == "add" and list(ids[:1]) != [beginning]
        return np.concatenate([[beginning], ids]) if lacks else ids

    def _adds_one(self, text: str, n_tokens: int) -> bool:
        """Whether the tokenizer put a beginning before that of the text; else both are the text's own."""
        return len(self._asked("without_special", "a beginning")(text)) < n_tokens

    @property
    def _beginning(self) -> int | None:
        return getattr(self.tokenize, "beginning", None)

    def _asked(self, method: str, by: str) -> Any:
        found = getattr(self.tokenize, method, None)
        if found is None:
            raise CheckpointError(f"{by}: the model's tokenizer is a plain function, which cannot be asked for that")
        return found
