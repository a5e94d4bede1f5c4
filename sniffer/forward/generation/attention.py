"""Statistics of attention while a model writes: what a step's queries do with the keys that its cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from sniffer.forward.generation.columns import Columns
from sniffer.forward.transfer import Transfer
from sniffer.tap import Attended
from sniffer.types import Answer, Caching, Document


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
        padding: columns before the first token of each.
        caching: how prompts come in, and where in a cache tokens are.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        documents: Sequence[Document],
        padding: Sequence[int],
        transfer: Transfer,
        caching: Caching,
    ) -> None:
        self._plan, self._padding, self._transfer, self._caching = plan, padding, transfer, caching
        self._proven: set[tuple[int, bool, bool]] = set()
        self._sections = NamedSections(plan.layout.sections, [one.sections for one in documents])

    def wants(self, layer: int) -> bool:
        return layer in self._plan.ways

    def of_step(
        self,
        layer: int,
        shown: Attended,
        at: Columns,
        rows: Int64[np.ndarray, " picks"],
        positions: Int64[np.ndarray, " picks"],
    ) -> Float32[Tensor, "picks heads width"]:
        """Statistics of picks in some columns, ascending by row and position.

        Raises:
            CaptureError: attention has other queries than those of these columns, or what is computed is not what it
                gave.
        """
        call = self._filled(Call.of(shown), at)
        if (call.q.shape[0], call.q.shape[2]) != (len(self._padding), at.new):
            raise CaptureError(
                f"layer {layer} attends with {call.q.shape[0]} x {call.q.shape[2]} queries in a step of "
                f"{len(self._padding)} x {at.new} tokens: set generate.live=false"
            )
        bounds = np.searchsorted(rows, np.arange(len(self._padding) + 1))
        index = self._transfer.upload(positions.astype(np.int32), call.q.device)
        found = []
        for row, (begin, end) in enumerate(pairwise(bounds.tolist())):
            if begin < end:
                before = max(0, at.begin - self._padding[row])
                count = at.end - self._padding[row] - before
                queries = Queries(0, positions[begin:end].astype(np.int32), index[begin:end], before)
                scores = FromCall(text_of(call, row, before, count), self._plan.ways[layer].ungrouped)
                if (proof := (layer, at.begin == 0, count > 1)) not in self._proven:
                    require_proven(layer, scores, queries.some(PROVEN_QUERIES))
                    self._proven.add(proof)
                found.append(of_text(scores, queries, self._plan, self._sections.of(row, call.q.device)))
        return torch.cat(found)

    def _filled(self, call: Call, at: Columns) -> Call:
        """Without the room that a static cache has for tokens to come."""
        if self._caching.cache != "static" or call.k.shape[2] <= at.end:
            return call
        k, v = call.k[:, :, : at.end], call.v[:, :, : at.end]
        return replace(call, k=k, v=v, mask=call.mask[..., : at.end] if isinstance(call.mask, Tensor) else call.mask)
