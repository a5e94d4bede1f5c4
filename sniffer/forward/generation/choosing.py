"""The token that comes next, from the logits of the last one.

What is drawn depends on a number in [0, 1) that belongs to the document and the position, and not on the batch: it
is where the cumulated probabilities of the tokens reach that number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.forward.generation.request import GenerateConfig
from sniffer.hashing import key_of
from sniffer.types import Document


def next_tokens(
    logits: Float[Tensor, "rows vocabulary"], how: GenerateConfig, documents: Sequence[Document], step: int
) -> Int64[np.ndarray, " rows"]:
    """The token of each document after `step` that have been generated.

    Raises:
        CaptureError: a logit is no number.
    """
    largest, likeliest = logits.max(-1)
    if bool(largest.isnan().any()):
        raise no_numbers()
    if how.method == "greedy":
        found: Int64[np.ndarray, " rows"] = likeliest.cpu().numpy().astype(np.int64)
        return found
    rows = logits.float().cpu().numpy().astype(np.float64)
    numbers = [number_of(how.seed, document, document.n_tokens + step) for document in documents]
    return np.array([drawn(row, how, number) for row, number in zip(rows, numbers, strict=True)], dtype=np.int64)


def no_numbers() -> CaptureError:
    return CaptureError("the model's logits are no numbers (NaN): take a wider model.dtype, or look at its weights")


def number_of(seed: int, document: Document, position: int) -> float:
    """The number in [0, 1) that decides which token a document has at a position."""
    return (key_of(seed, "generate", document.example_id, position) >> 11) * 2.0**-53


def drawn(logits: Float64[np.ndarray, " vocabulary"], how: GenerateConfig, number: float) -> int:
    """The token at which the probabilities, cumulated from the likeliest token on, pass `number`."""
    order = np.argsort(-logits, kind="stable")[: how.top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / how.temperature)
    cumulated = np.cumsum(weights) / weights.sum()
    if how.top_p is not None:
        kept = 1 + int(np.searchsorted(cumulated, how.top_p, side="left"))
        cumulated = cumulated[:kept] / cumulated[min(kept, len(cumulated)) - 1]
    place = int(np.searchsorted(cumulated, number, side="right"))
    return int(order[min(place, len(cumulated) - 1)])
