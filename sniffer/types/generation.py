"""What a model has written after a prompt, and which sections these tokens belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from sniffer.types.sections import Names

ENDS = ("eos", "stop", "length")
"""Why a text ends: a token that ends texts, one of `generate.stop`, or as many tokens as there may be."""

PROMPT, GENERATED = "prompt", "generated"
"""Sections where a dataset has none of its own."""

ASSISTANT, THINKING, ANSWER = "assistant", "thinking", "answer"
"""Sections of what is written in a chat."""


@dataclass(frozen=True, eq=False)
class Generated:
    """The last tokens of a document, which a model has written, and why it wrote no more: one of ENDS."""

    token_ids: Int32[np.ndarray, " generated"]
    end: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Generated):
            return NotImplemented
        return self.end == other.end and np.array_equal(self.token_ids, other.token_ids)

    def __hash__(self) -> int:
        return hash((self.token_ids.tobytes(), self.end))

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Difference:
    """How far two captures of `vectors` are apart.

    `largest` is the largest difference of two numbers, `relative` the largest norm of a difference over its vector's.
    """

    vectors: int = 0
    largest: float = 0.0
    relative: float = 0.0

    def __add__(self, other: Difference) -> Difference:
        worst = max(self.largest, other.largest), max(self.relative, other.relative)
        return Difference(self.vectors + other.vectors, *worst)


@dataclass(frozen=True)
class Answer:
    """How tokens that a model writes are named: `section`; or by the tags that a template has around thoughts.

    `tags` are the tokens that begin and end thoughts, if it has some: from the one to the other, both included, tokens
    are `thinking`, others are `answer`. A prompt may have left thoughts open.
    """

    section: str = GENERATED
    tags: tuple[int, int] | None = None

    @property
    def known(self) -> tuple[str, ...]:
        """The sections that there may be."""
        return (self.section,) if self.tags is None else (ANSWER, THINKING)

    def names(self, prompt: Sequence[int], generated: Sequence[int]) -> Names:
        """The section of each generated token."""
        if self.tags is None:
            return Names((self.section,), np.zeros(len(generated), dtype=np.int32))
        opens, closes = self.tags
        last = next((token for token in reversed(prompt) if token in self.tags), closes)
        thinking, codes = last == opens, []
        for token in generated:
            thinking = thinking or token == opens
            codes.append(int(thinking))
            thinking = thinking and token != closes
        return Names((ANSWER, THINKING), np.array(codes, dtype=np.int32))
