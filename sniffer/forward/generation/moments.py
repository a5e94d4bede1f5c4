"""Moments while a model writes: sums over all positions, those of prompts and those of every step.

A step has one position of each document, for which a sum of its own would be dear. So the vectors of HELD steps are
kept side by side, and then summed as stretches of their documents. Steps are counted from the end of a prompt: what a
document gives does not depend on what it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from sniffer.errors import CaptureError, ConfigError
from sniffer.forward.moments.counting import Counting, Lies, MomentsPlan
from sniffer.types import Answer, Document, MomentsLayout, TokenBatch

HELD = 64
"""Steps whose vectors are held."""


def require_told(layout: MomentsLayout, answer: Answer) -> None:
    """Raises ConfigError where of which section a token is, is known at the end only."""
    if len(answer.known) > 1 and (unclear := sorted({*layout.sections} & {*answer.known})):
        raise ConfigError(
            f"capture.moments.sections names {unclear}, and which tokens are of these is known when a text has ended: "
            "leave them out, or set generate.live=false"
        )


class StepMoments:
    """Of one batch of prompts that a model goes on with, but for documents that were counted before.

    Args:
        longest: the documents as long as they may become.
        counted: example ids of those that are not counted again.
    """

    def __init__(
        self, plan: MomentsPlan, prompts: TokenBatch, longest: Sequence[Document], counted: Collection[int]
    ) -> None:
        self.plan = plan
        self._longest, self._counted = TokenBatch(tuple(longest), prompts.pad_id), counted
        self._lengths = [document.n_tokens for document in prompts.documents]
        self._step = 0
        self._held: dict[tuple[int, str], Tensor] = {}
        self._sums = self._counting([Lies(row, 0, n, prompts.seq_len - n) for row, n in enumerate(self._lengths)])

    @property
    def wanted(self) -> bool:
        """Whether there is any document to count."""
        return bool(self._sums.documents)

    def see(
        self,
        layer: int,
        kind: str,
        new: Shaped[Tensor, "batch heads new dim"],
        heads: Int[Tensor, " active"] | None,
    ) -> None:
        """Takes what a layer shows of a kind, of the tokens of this step.

        Args:
            heads: those to count, as an index on the device; None for all.
        """
        if self._step == 0:
            self._sums.see(layer, kind, new, heads)
            return
        some = new if heads is None else new.index_select(1, heads)
        held = self._held.get((layer, kind))
        if held is None:
            batch, active, _, dim = some.shape
            held = self._held[layer, kind] = torch.empty(
                (batch, active, HELD, dim), dtype=some.dtype, device=some.device
            )
        held[:, :, (self._step - 1) % HELD] = some[:, :, 0]

    def advance(self, written: Sequence[int]) -> None:
        """A forward has ended; of each text so many tokens were written until then, and have been shown."""
        if self._step and self._step % HELD == 0:
            self._sum(self._step - HELD, self._step, written)
        self._step += 1

    def end(self, batch: TokenBatch) -> Counting:
        """Those of the documents as they have become.

        Raises:
            CaptureError: not every vector was shown.
        """
        steps = self._step - 1
        written = [one.n_tokens - n for one, n in zip(batch.documents, self._lengths, strict=True)]
        self._sum(steps - steps % HELD, steps, written)
        self._held.clear()
        wanted = sum(one.n_tokens for one in batch.documents if one.example_id not in self._counted)
        for layer, kind in self.plan.heads if wanted else ():
            if sum(sums.n for sums in self._sums.sums.get((layer, kind), {}).values()) != wanted:
                raise CaptureError(f"layer {layer} has not shown its {kind} of every token: set generate.live=false")
        return self._sums

    def _sum(self, before: int, steps: int, written: Sequence[int]) -> None:
        """Sums up the steps after so many, up to so many; texts may have ended sooner."""
        lies = [
            Lies(row, n + before, n + max(before, min(steps, some)))
            for row, (n, some) in enumerate(zip(self._lengths, written, strict=True))
        ]
        if before < steps and self._held:
            counting = self._counting(lies)
            for (layer, kind), held in self._held.items():
                counting.see(layer, kind, held[:, :, : steps - before], None)
            self._sums.join(counting)

    def _counting(self, lies: Sequence[Lies]) -> Counting:
        return Counting(self.plan, self._longest, self._counted, lies)
