"""Proof of statistics of attention: softmax of the logits, times the values, is what attention returned.

It fails where a mask, a soft cap, a sink, a bias or a scale was forgotten. At start-up a short probe is looked at,
every position of every layer; in a run, some queries of each text that is longer than any before, so that windows
beyond the probe's length and scalings of long texts are looked at as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sniffer.errors import CaptureError, UnsupportedModelError
from sniffer.forward.attention.calls import Call
from sniffer.forward.attention.scores import FromCall, FromSoftmax, Queries, Scores
from sniffer.forward.attention.softmax import Watch
from sniffer.forward.attention.statistics import Weights
from sniffer.tap import Attended, Seen, as_written, tap
from sniffer.types import Backbone

PROBE_ROWS, PROBE_TOKENS = 2, 11

FLOOR = 2e-5
"""Relative difference that is no more than rounding in any dtype: sums are taken in other orders."""
ROUNDINGS = 8
"""Times the rounding of a dtype, and once more for each unit of the largest logit: products are rounded before
softmax where attention is computed step by step."""


@dataclass(frozen=True)
class Way:
    """How the logits of a layer are had.

    `inline`: from the softmax in its own code, else from its call; `ungrouped` as in `FromCall`.
    """

    inline: bool = False
    ungrouped: bool = False


@dataclass(frozen=True)
class Apart:
    """How far what is computed is from what attention returned, by query head.

    `off` is relative, of root mean squares over queries and values; `may` is how far rounding may take it.
    """

    off: Float[Tensor, " heads"]
    may: Float[Tensor, " heads"]

    @property
    def proves(self) -> bool:
        # A comparison with NaN is false.
        return bool((self.off <= self.may).all())

    def __str__(self) -> str:
        head = int((self.off / self.may).nan_to_num(torch.inf).argmax())
        return f"query head {head} differs by {float(self.off[head]):.1e}, and rounding by {float(self.may[head]):.1e}"


def apart(scores: Scores, queries: Queries) -> Apart:
    """Compares some queries of one text, all heads."""
    returned, heads = scores.returned(queries), scores.q.shape[1]
    off, size, largest = torch.zeros(3, heads, dtype=torch.float32, device=scores.q.device)
    for one in scores.slices(queries):
        weights, there = Weights(one, queries.index[one.picks]), returned[one.heads, one.picks]
        off[one.heads] += (weights.out - there).square().sum((1, 2))
        size[one.heads] += there.square().sum((1, 2))
        seen = one.logits.masked_fill(weights.weights == 0, 0).abs().amax((1, 2))
        largest[one.heads] = torch.maximum(largest[one.heads], seen)
    # Under autocast they are of several dtypes, and the product of the shortest.
    rounding = max(torch.finfo(one.dtype).eps for one in (scores.q, scores.k, scores.v))
    return Apart((off / size).sqrt(), FLOOR + rounding * (ROUNDINGS + largest))


ADVICE = (
    "leave the layer out of capture.layers, shorten the texts with dataset.max_tokens, or capture without "
    "capture.attention"
)


def require_proven(layer: int, scores: Scores, queries: Queries, advice: str = ADVICE) -> None:
    """Compares in the midst of a run; `advice` is what to do where that fails.

    Raises:
        CaptureError: what is computed is not what attention returned.
    """
    found = apart(scores, queries)
    if not found.proves:
        raise CaptureError(
            f"layer {layer}: statistics of attention do not follow from its own logits in a text of "
            f"{scores.k.shape[2]:,} tokens ({found}): {advice}"
        )


class Probe:
    """What one forward shows of the layers that are asked for."""

    def __init__(self, layer_of: Mapping[nn.Module, int], layers: Collection[int]) -> None:
        self.calls: dict[int, Attended] = {}
        self.inline: dict[int, FromSoftmax] = {}
        self.mode = Watch()
        self._layer_of = layer_of
        self._layers = layers

    def show(self, seen: Seen) -> None:
        layer = self._layer_of.get(seen.module)
        self.mode.look = None
        if layer is not None and layer in self._layers:
            self.mode.await_softmax(
                seen.k.shape[2], lambda logits, product: self.inline.update({layer: FromSoftmax(seen, logits, product)})
            )

    def called(self, shown: Attended) -> None:
        self.mode.look = None
        layer = self._layer_of.get(shown.module)
        if layer is not None and layer in self._layers:
            self.calls.setdefault(layer, shown)


@torch.inference_mode()
def prove(backbone: Backbone, layers: Collection[int]) -> dict[int, Way]:
    """How the logits of each layer are had, shown on a short probe.

    Raises:
        UnsupportedModelError: those of a layer cannot be had, or do not give what attention returned.
    """
    shown = probe(backbone, layers)
    return {layer: _way(layer, shown) for layer in layers}


def probe(backbone: Backbone, layers: Collection[int], rows: int = PROBE_ROWS, tokens: int = PROBE_TOKENS) -> Probe:
    """One short forward; where parts are compiled, as they were written."""
    first = min(16, backbone.vocabulary // 2)
    ids = torch.arange(rows * tokens, device=backbone.device) * 7 % max(1, backbone.vocabulary - first)
    shown = Probe(backbone.layer_of, layers)
    with as_written(), tap(shown.show, attended=shown.called), shown.mode:
        backbone((ids + first).view(rows, tokens))
    return shown


def scores_of(layer: int, shown: Probe) -> FromCall | FromSoftmax:
    """Where the logits of a layer are to be had from.

    Raises:
        UnsupportedModelError: they cannot be had, or do not give what attention returned.
    """
    if layer in shown.calls:
        scores: FromCall | FromSoftmax = FromCall(Call.of(shown.calls[layer]))
    elif layer in shown.inline:
        scores = shown.inline[layer]
    else:
        raise UnsupportedModelError("it neither calls a function of attention nor has a softmax over its keys")
    _require(scores)
    return scores


def _way(layer: int, shown: Probe) -> Way:
    try:
        scores = scores_of(layer, shown)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"capture.attention is not possible in layer {layer}: {error}; leave it out of capture.layers, choose "
            "another model.attn_implementation, or capture without"
        ) from error
    return Way(inline=True) if isinstance(scores, FromSoftmax) else Way(ungrouped=_may_be_ungrouped(scores.call))


def _require(scores: Scores) -> None:
    whole = all_queries(scores)
    # A few queries too, whose keys end before the text does.
    for queries in (*whole, whole[0].some(3).until(len(whole[0]) - 2)):
        found = apart(scores, queries)
        if not found.proves:
            raise UnsupportedModelError(f"softmax of its logits times its values is not what it returned ({found})")


def _may_be_ungrouped(call: Call) -> bool:
    """Whether logits are the same with the query heads of one key head side by side."""
    if call.q.shape[1] == call.k.shape[1]:
        return False
    plain, beside = FromCall(call), FromCall(call, ungrouped=True)
    try:
        pairs = ((logits_of(plain, queries), logits_of(beside, queries)) for queries in all_queries(plain))
        return all(
            one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in pairs
        )
    except UnsupportedModelError:
        return False


def logits_of(scores: Scores, queries: Queries) -> Float[Tensor, "heads picks columns"]:
    """Of all slices."""
    slices = list(scores.slices(queries))
    whole = slices[0].logits.new_full((scores.q.shape[1], len(queries), slices[0].logits.shape[2]), torch.nan)
    for one in slices:
        whole[one.heads, one.picks] = one.logits
    return whole


def all_queries(scores: Scores) -> list[Queries]:
    rows, _, tokens, _ = scores.q.shape
    index = torch.arange(tokens, device=scores.q.device)
    return [Queries(row, np.arange(tokens, dtype=np.int32), index) for row in range(rows)]
