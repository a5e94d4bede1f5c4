"""What a request brings along where its tokens are drawn: the law, and a number for each of them. Needs no vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from sniffer.forward.generation.choosing import drawn, no_numbers, number_of
from sniffer.forward.generation.request import GenerateConfig
from sniffer.types import Document

DRAWS = "sniffer_draws"
"""Where a request has it, in SamplingParams.extra_args."""


@dataclass(frozen=True)
class Draws:
    """How a document goes on: `numbers` are those of the tokens that it may get, in order (`number_of`)."""

    how: GenerateConfig
    numbers: tuple[float, ...]

    @classmethod
    def of(cls, document: Document, how: GenerateConfig) -> Draws:
        """For one token more than are written: vLLM draws it, and it is left."""
        positions = range(document.n_tokens, document.n_tokens + how.max_new_tokens + 1)
        return cls(how, tuple(number_of(how.seed, document, position) for position in positions))

    def token(self, step: int, logits: Float64[np.ndarray, " vocabulary"]) -> int:
        """The token after so many; raises CaptureError where a logit is no number."""
        if np.isnan(logits).any():
            raise no_numbers()
        return drawn(logits, self.how, self.numbers[step])
