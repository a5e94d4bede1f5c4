"""What a model has written after a prompt, and which sections these tokens belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


CACHES = ("dynamic", "static", "quantized")
"""Where keys and values are kept while a model writes, as transformers calls it (`cache_implementation`)."""

BACKENDS = {"quanto": "optimum-quanto", "hqq": "hqq", "fp8": None}
"""What quantises a cache, and the package that it takes."""


@dataclass(frozen=True)
class Caching:
    """The cache that a model writes with, and how prompts come into it.

    Attributes:
        cache: one of CACHES; None for what transformers takes by itself.
        backend: one of BACKENDS, of a quantized cache.
        chunk: tokens of a prompt that go through the model at a time; None for all of them.
    """

    cache: str | None = None
    backend: str | None = None
    chunk: int | None = None

    def newest(self, states: Any, before: int, new: int) -> Any:
        """Of keys or values (batch, heads, columns, dim) in a step, those of its `new` columns, after `before` others.

        They are the last ones; but a static cache has room for those to come behind them.
        """
        if self.cache == "static" and states.shape[2] > before + new:
            return states[:, :, before : before + new]
        return states[:, :, -new:]

    def as_json(self) -> dict[str, Any]:
        """For the manifest: what is not as transformers has it by itself."""
        told = {"cache": self.cache, "cache_backend": self.backend, "prefill_chunk_size": self.chunk}
        return {key: value for key, value in told.items() if value is not None}


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
