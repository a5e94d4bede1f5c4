"""Moments while a model writes: sums over all positions, those of prompts and those of every step.

A step has one position of each document, for which a sum of its own would be dear. So the vectors of HELD steps are
kept side by side, and then summed as stretches of their documents. Steps are counted from the end of a prompt: what a
document gives does not depend on what it shares a batch with. Where prompts come in chunks, what does is where these
begin and end, but for rounding in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from sniffer.errors import CaptureError, ConfigError
from sniffer.forward.generation.columns import Columns
from sniffer.forward.moments.counting import Counting, Lies, MomentsPlan
from sniffer.types import Answer, Document, MomentsLayout, TokenBatch

HELD = 64
"""Columns whose vectors are held."""


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

    Attributes:
        written: the tokens of each text so far, all of which have been shown when the next forward begins.
    """

    def __init__(
        self, plan: MomentsPlan, prompts: TokenBatch, longest: Sequence[Document], counted: Collection[int]
    ) -> None:
        self.plan = plan
        self.written = [0] * len(prompts.documents)
        self._seq, self._lengths = prompts.seq_len, [document.n_tokens for document in prompts.documents]
        self._longest, self._counted = TokenBatch(tuple(longest), prompts.pad_id), counted
        self._sums = Counting(plan, self._longest, counted, ())
        self._held: dict[tuple[int, str], _Held] = {}
        self._one: tuple[Columns, Counting] | None = None

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
        at: Columns,
    ) -> None:
        """Takes what a layer shows of a kind, in columns that follow on those before.

        Args:
            heads: those to count, as an index on the device; None for all.
        """
        pair, held = (layer, kind), self._held.get((layer, kind))
        some = new if heads is None else new.index_select(1, heads)
        # Of prompts nothing stays to be summed with steps.
        if held is not None and held.n and (held.n + at.new > HELD or at.begin == self._seq):
            self._sum(pair, held.taken())
        if at.new >= HELD or at.end == self._seq == at.new:
            self._sum(pair, (at, some))
            return
        if held is None:
            held = self._held[pair] = _Held(some, HELD)
        held.put(some, at)

    def end(self, batch: TokenBatch) -> Counting:
        """Those of the documents as they have become.

        Raises:
            CaptureError: not every vector was shown.
        """
        self.written = [one.n_tokens - n for one, n in zip(batch.documents, self._lengths, strict=True)]
        for pair, held in self._held.items():
            if held.n:
                self._sum(pair, held.taken())
        self._held.clear()
        wanted = sum(one.n_tokens for one in batch.documents if one.example_id not in self._counted)
        for layer, kind in self.plan.heads if wanted else ():
            if sum(sums.n for sums in self._sums.sums.get((layer, kind), {}).values()) != wanted:
                raise CaptureError(f"layer {layer} has not shown its {kind} of every token: set generate.live=false")
        return self._sums

    def _sum(self, pair: tuple[int, str], shown: tuple[Columns, Tensor]) -> None:
        """Sums up what was shown in some columns; texts may have ended before the last of them."""
        at, states = shown
        if self._one is None or self._one[0] != at:  # of other layers and kinds it is the same
            self._one = at, Counting(self.plan, self._longest, self._counted, self._lies(at))
        counting = self._one[1]
        counting.see(*pair, states, None)
        self._sums.join(pair, counting)

    def _lies(self, at: Columns) -> list[Lies]:
        found = []
        for row, (n, some) in enumerate(zip(self._lengths, self.written, strict=True)):
            padding = self._seq - n
            first, end = max(0, at.begin - padding), min(at.end - padding, n + some)
            if first < end:
                found.append(Lies(row, first, end, first + padding - at.begin))
        return found


class _Held:
    """Vectors of columns side by side, from `at` on, of one layer and kind: `n` of them."""

    def __init__(self, like: Shaped[Tensor, "batch heads new dim"], columns: int) -> None:
        batch, heads, _, dim = like.shape
        self._states = torch.empty((batch, heads, columns, dim), dtype=like.dtype, device=like.device)
        self._begin = self.n = 0

    def put(self, new: Shaped[Tensor, "batch heads new dim"], at: Columns) -> None:
        if not self.n:
            self._begin = at.begin
        self._states[:, :, self.n : self.n + at.new] = new
        self.n += at.new

    def taken(self) -> tuple[Columns, Tensor]:
        """All that is held; then nothing is."""
        at = Columns(self._begin, self.n)
        self.n = 0
        return at, self._states[:, :, : at.new]
