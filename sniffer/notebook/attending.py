"""What queries do with their keys, in calls that somebody else makes: statistics as a run has them.

A call may have its texts padded on either side, several in a row, or their first tokens in a cache. Each is cut out
with its keys where their positions are (forward/attention/steps.py), and in each call what is computed is compared with
what attention returned: of every text of a prompt, and of one text of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from sniffer.errors import CaptureError, ConfigError, UnsupportedModelError
from sniffer.forward.attention.attending import PROVEN_QUERIES, AttentionPlan, of_text
from sniffer.forward.attention.calls import Call as AttentionCall
from sniffer.forward.attention.layout import layout_of
from sniffer.forward.attention.masks import mask_rows
from sniffer.forward.attention.prove import prove, require_proven
from sniffer.forward.attention.scores import FromCall, Queries
from sniffer.forward.attention.statistics import NamedSections
from sniffer.forward.attention.steps import text_of
from sniffer.forward.observer import Observer
from sniffer.forward.selection import CaptureConfig, Selection
from sniffer.forward.transfer import Transfer
from sniffer.notebook.attached import Attached
from sniffer.notebook.batch import IMAGE, CallBatch, first_of_call
from sniffer.notebook.masks import SHUT
from sniffer.sampler import Picker
from sniffer.types import ATTENTION, Picks, draw_of

if TYPE_CHECKING:
    from sniffer.tap import Attended

AT_ONCE = 256
"""Rows of a mask that are looked at together."""

ADVICE = "leave it out of layers=[...], or sniff without attention"


def plan_for(
    backbone: Attached, request: CaptureConfig, selection: Selection, picker: Picker, max_tokens: int | None
) -> AttentionPlan | None:
    """What is kept of attention, for texts of at most `max_tokens`, or as many as the model takes; None for nothing.

    Raises:
        ConfigError: nothing says how long texts may be.
        UnsupportedModelError: the logits of a layer cannot be had from its call of attention, as a short probe shows.
    """
    if not request.attention:
        return None
    if unknown := sorted({*(request.attention_sections or ())} - {IMAGE}):
        raise ConfigError(f"attention_sections names {unknown}: documents of calls have the section {IMAGE} alone")
    longest = backbone.max_positions if max_tokens is None else max_tokens
    if longest is None or not 1 <= longest < 1 << 31:
        told = "this model's config does not say it" if max_tokens is None else f"not {max_tokens}"
        raise ConfigError(f"attention needs to know how long texts may be, and {told}: give max_tokens=")
    layout = layout_of(request, picker, longest)
    assert layout is not None
    with backbone.undisturbed(), beside(backbone.device):
        ways = prove(backbone, selection.layers)
    if inline := sorted(layer for layer, way in ways.items() if way.inline):
        raise UnsupportedModelError(
            f"attention of layer {inline[0]} is no call of a function, but the softmax in its own code, which sniff "
            "does not look at: leave the layer out of layers=[...], sniff without attention, or capture a run"
        )
    return AttentionPlan(layout, ways, picker.side("k").buckets_until(longest))


def require_room(plan: AttentionPlan, batch: CallBatch) -> None:
    """Refuses, before the forward, texts for which rows have no columns.

    Raises:
        CaptureError: naming how long they are.
    """
    ends = [one.first_position + one.n_tokens for one in batch.documents]
    if max(ends, default=0) > len(plan.buckets):
        raise CaptureError(
            f"a text of this call has {max(ends):,} tokens, and rows of attention have columns for "
            f"{len(plan.buckets):,}: give sniff max_tokens={max(ends)} or more"
        )


@dataclass
class CallAttention:
    """Statistics of one call of a model, layer by layer: is shown its calls of attention when they are over.

    Attributes:
        held: the columns of the call's cache before it.
        observer: has the picks, and takes the statistics.
        transfer: the way to the device.
        sections: those that are weighed, of each document's tokens until the end of the call.
    """

    plan: AttentionPlan
    layer_of: Mapping[nn.Module, int]
    batch: CallBatch
    held: int
    observer: Observer
    transfer: Transfer
    sections: NamedSections

    def __call__(self, shown: Attended) -> None:
        """
        Raises:
            CaptureError: what is computed is not what attention returned, or it has other queries than the call.
            UnsupportedModelError: it is a call of no kind that is known.
        """
        layer = self.layer_of.get(shown.module)
        if layer is None or layer not in self.plan.ways:
            return
        if (layer, ATTENTION) in self.observer.vectors:
            raise CaptureError(f"layer {layer} attends twice in one call: {ADVICE}")
        if shown.keywords.get("dropout") or shown.keywords.get("dropout_p"):
            raise CaptureError(
                f"layer {layer} attends with dropout, of which statistics say nothing: call model.eval() first, or "
                "sniff without attention"
            )
        call = AttentionCall.of(shown)
        with beside(call.q.device, training=shown.module.training):
            self.observer.keep_statistics(layer, self._columns(layer, call))

    def _columns(self, layer: int, call: AttentionCall) -> Float32[Tensor, "picks heads width"]:
        batch, queries, keys = call.q.shape[0], call.q.shape[2], call.k.shape[2]
        if (batch, queries) != self.batch.grid.shape or call.k.shape[0] != batch or keys < queries:
            raise CaptureError(
                f"layer {layer} attends with {batch} x {queries} queries and {keys} keys in a call of "
                f"{self.batch.n_rows} x {self.batch.seq_len} tokens: {ADVICE}"
            )
        begin = first_of_call(keys, queries, self.held)
        picks, device = self.observer.picks[draw_of((layer, ATTENTION))], call.q.device
        index = self.transfer.upload(picks.positions, device)
        found: list[Tensor] = []
        for number, some in _by_piece(picks, len(self.batch.pieces)):
            piece = self.batch.pieces[number]
            last = piece.first_column + piece.n_tokens
            text = text_of(call, piece.row, piece.first_position, piece.n_tokens, last, begin + last)
            texts = Queries(0, picks.positions[some], index[some], piece.first_position)
            scores = FromCall(text, self.plan.ways[layer].ungrouped)
            if queries > 1:
                _require_no_later_keys(layer, text, texts)
            if queries > 1 or not found:
                require_proven(layer, scores, texts.some(PROVEN_QUERIES), ADVICE)
            found.append(of_text(scores, texts, self.plan, self.sections.of(number, device)))
        if not found:
            return torch.empty(0, call.q.shape[1], self.plan.layout.width(call.v.shape[-1]), device=device)
        return torch.cat(found)


def _by_piece(picks: Picks, pieces: int) -> Iterator[tuple[int, slice]]:
    """The picks of each piece that has some."""
    bounds = np.searchsorted(picks.rows, np.arange(pieces + 1))
    for number, (first, last) in enumerate(pairwise(bounds.tolist())):
        if first < last:
            yield number, slice(first, last)


def _require_no_later_keys(layer: int, text: AttentionCall, queries: Queries) -> None:
    """Refuses tokens that see what comes after them, as those of an image may: columns are of keys before a query.

    Raises:
        CaptureError: there are some.
    """
    if text.mask is None:
        return
    keys = text.k.shape[2]
    for places, positions in zip(queries.places.split(AT_ONCE), queries.index.split(AT_ONCE), strict=True):
        mask = mask_rows(text, 0, places, keys, queries.first)
        later = torch.arange(keys, device=mask.device) > positions[:, None]
        if bool(((mask > SHUT) & later).any()):
            raise CaptureError(
                f"tokens of this call see those after them in layer {layer}, as those of an image do, for which rows "
                f"have no columns: {ADVICE}"
            )


@contextmanager
def beside(device: torch.device, *, training: bool = False) -> Iterator[None]:
    """What is computed beside a model's own computation: without gradients and casts, as in a run.

    In `training` a function of upstream's may draw random numbers, which then go on where they were.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if training:
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        yield
