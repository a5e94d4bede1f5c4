"""A worker's share of generation: a batch of prompts is gone on with, and captured meanwhile, or afterwards."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from sniffer.forward.generation.continuing import Decode, continued
from sniffer.forward.generation.live import longest_of, possible_places
from sniffer.forward.generation.request import BOTH, Continuing
from sniffer.forward.observer import draw
from sniffer.forward.passes import Passes
from sniffer.forward.selection import Selection
from sniffer.sampler import Picker
from sniffer.types import Difference, Document, LanguageModel, LengthClasses, TokenBatch


class Generation:
    """One language model at work.

    `differences` are those between what is captured live and in one forward over the whole document, by (layer, kind),
    where both are wanted.
    """

    def __init__(
        self,
        model: LanguageModel,
        plan: Continuing,
        passes: Passes,
        picker: Picker,
        selection: Selection,
        lengths: LengthClasses,
        decode: Decode,
    ) -> None:
        self.differences: dict[tuple[int, str], Difference] = {}
        self._model, self._plan, self._passes = model, plan, passes
        self._picker, self._selection = picker, selection
        self._lengths, self._decode = lengths, decode

    @torch.inference_mode()
    def run(self, prompts: TokenBatch, done: Mapping[tuple[int, str], Collection[int]]) -> None:
        """One batch; its rows are kept by a later `settle` of the passes, but those that are `done` already."""
        how, clock, live = self._plan.how, self._passes.clock, None
        if how.live:
            with clock.stage("sample"):
                what = self._picker, self._selection, prompts, how.max_new_tokens, self._plan.answer
                longest: tuple[Document, ...] = ()
                if self._passes.attention is not None or self._passes.totals is not None:
                    longest = longest_of(prompts, how.max_new_tokens, self._plan.answer.known[0])
                live = self._passes.live(prompts, possible_places(*what), longest, done, how.caching)
        batch = continued(self._model, prompts, self._plan, self._lengths, self._decode, clock, live)
        with clock.stage("sample"):
            picks = draw(self._picker, self._selection, batch)
        if live is None:
            self._passes.run(batch, picks, done)
            return
        rows = live.rows(batch, picks)
        if how.live == BOTH:
            for pair, found in self._passes.apart(rows).items():
                self.differences[pair] = self.differences.get(pair, Difference()) + found
        self._passes.take(rows, done)

    def take_differences(self) -> dict[tuple[int, str], Difference]:
        """Those since they were last asked for."""
        found, self.differences = self.differences, {}
        return found
