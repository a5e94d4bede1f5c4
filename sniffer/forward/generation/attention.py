"""Statistics of attention while a model writes: what a step's queries do with the keys that its cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sniffer.errors import CaptureError, ConfigError, UnsupportedModelError
from sniffer.forward.attention.attending import PROVEN_QUERIES, AttentionPlan, of_text
from sniffer.forward.attention.calls import Call
from sniffer.forward.attention.prove import require_proven
from sniffer.forward.attention.scores import FromCall, Queries
from sniffer.forward.attention.statistics import NamedSections
from sniffer.forward.attention.steps import text_of
from sniffer.forward.transfer import Transfer
from sniffer.tap import Attended
from sniffer.types import Answer, Document


def require_steps(plan: AttentionPlan, answer: Answer) -> None:
    """Meets what cannot be told while a model writes.

    Raises:
        UnsupportedModelError: a layer attends in its own code.
        ConfigError: of which section a token is, is known at the end only.
    """
    if inline := sorted(layer for layer, way in plan.ways.items() if way.inline):
        raise UnsupportedModelError(
            f"capture.attention of layer {inline[0]} is had from the softmax in its own code, and not step by step: "
            "set generate.live=false, or leave the layer out of capture.layers"
        )
    if len(answer.known) > 1 and (unclear := sorted({*plan.layout.sections} & {*answer.known})):
        raise ConfigError(
            f"capture.attention_sections names {unclear}, and which tokens are of these is known when a text has "
            "ended: leave them out, or set generate.live=false"
        )


class StepAttention:
    """Of one batch of prompts that a model goes on with.

    What is computed is compared with what attention returned: in each layer, of its first prompts and its first step.

    Args:
        documents: as long as they may become.
        lengths: tokens of their prompts.
    """

    def __init__(
        self, plan: AttentionPlan, documents: Sequence[Document], lengths: Sequence[int], transfer: Transfer
    ) -> None:
        self._plan, self._lengths, self._transfer = plan, lengths, transfer
        self._proven: set[tuple[int, bool]] = set()
        self._sections = NamedSections(plan.layout.sections, documents)

    def wants(self, layer: int) -> bool:
        return layer in self._plan.ways

    def of_step(
        self,
        layer: int,
        shown: Attended,
        step: int,
        rows: Int64[np.ndarray, " picks"],
        positions: Int64[np.ndarray, " picks"],
    ) -> Float32[Tensor, "picks heads width"]:
        """Statistics of picks, ascending by row and position.

        Args:
            step: 0 for the prompts, then that of each further token.

        Raises:
            CaptureError: attention has other queries than those of this step, or what is computed is not what it gave.
        """
        call = Call.of(shown)
        wanted = len(self._lengths), max(self._lengths) if step == 0 else 1
        if (call.q.shape[0], call.q.shape[2]) != wanted:
            raise CaptureError(
                f"layer {layer} attends with {call.q.shape[0]} x {call.q.shape[2]} queries in a step of "
                f"{wanted[0]} x {wanted[1]} tokens: set generate.live=false"
            )
        bounds = np.searchsorted(rows, np.arange(len(self._lengths) + 1))
        index = self._transfer.upload(positions.astype(np.int32), call.q.device)
        found = []
        for row, (begin, end) in enumerate(pairwise(bounds.tolist())):
            if begin < end:
                queries = self._queries(row, step, positions[begin:end].astype(np.int32), index[begin:end])
                count = self._lengths[row] if step == 0 else 1
                scores = FromCall(text_of(call, row, queries.first, count), self._plan.ways[layer].ungrouped)
                if (layer, step == 0) not in self._proven:
                    require_proven(layer, scores, queries.some(PROVEN_QUERIES))
                    self._proven.add((layer, step == 0))
                found.append(of_text(scores, queries, self._plan, self._sections.of(row, call.q.device)))
        return torch.cat(found)

    def _queries(self, row: int, step: int, positions: np.ndarray, index: Tensor) -> Queries:
        return Queries(0, positions, index, 0 if step == 0 else self._lengths[row] + step - 1)
