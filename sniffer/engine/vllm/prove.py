"""The start-up proof: what vLLM's layers are given is what those of transformers are, token for token, head for head.

Two texts of different lengths, and a few tokens after each, go through the model in transformers, which the usual
proofs have shown to be tapped right; then it is let go of, so that the model need not fit twice. vLLM gets the texts
as prompts and writes these tokens. Every head's q, k and v at all positions must be equal up to rounding: a head or a
position that were another's would be off by about its whole length. Where q_pre and k_pre are to be captured, these
are held against those of transformers likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sniffer.engine.vllm.model import VllmModel
from sniffer.engine.vllm.steps import Pair
from sniffer.errors import UnsupportedModelError
from sniffer.forward.generation.live import places_of
from sniffer.forward.observer import Observer, Wanted
from sniffer.forward.selection import Selection
from sniffer.forward.transfer import BlockingTransfer
from sniffer.types import KIND, Backbone, Document, LayerGeometry, Picks, TokenBatch, by_number

LENGTHS, NEW = (19, 7), 4
"""Of the texts, and the tokens that come after each. The first is longer where layers look back over a window."""
LONGEST = 4096
"""Of windows at least as long it is not shown that they are the same; vLLM must name the same number."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2}
OTHERWISE = 1e-1
"""How far a head may be off, over its length: kernels round otherwise, and layers add it up."""
STATES_ROUNDED = 4e-1
"""The same where layers round what they multiply to eight bits, and a value between two steps goes to either."""


@dataclass(frozen=True)
class Shown:
    """What a model in transformers has shown of the texts: all heads side by side, by (layer, kind).

    `allowed` is how far vLLM's may be off.
    """

    batch: TokenBatch
    picks: Mapping[Pair, Picks]
    heads: Mapping[Pair, tuple[int, ...]]
    vectors: Mapping[Pair, Tensor]
    dims: Mapping[Pair, int]
    allowed: float


@torch.inference_mode()
def shown_by(backbone: Backbone, geometry: Sequence[LayerGeometry], longest: int | None, *, pre: bool) -> Shown:
    """The vectors of all positions of the texts.

    Args:
        geometry: the layers, with the kinds that each can be shown to have.
        longest: tokens of the longest text to come; None where that is not known.
        pre: whether of the kinds before RoPE too.
    """
    most = min(LONGEST, longest or LONGEST)
    windows = {layer.sliding_window for layer in backbone.geometry}
    long = max(LENGTHS[0], *(window + LENGTHS[0] for window in windows if window is not None and window < most), 0)
    batch = TokenBatch(tuple(_texts(backbone.vocabulary, (long, LENGTHS[1]))), 0)
    pairs = [(layer, kind) for layer in geometry for kind in layer.heads if pre or not KIND[kind].pre]
    heads = {(layer.layer, kind): tuple(range(layer.heads[kind])) for layer, kind in pairs}
    dims = {(layer.layer, kind): layer.dims[kind] for layer, kind in pairs}
    every = _every(batch)
    picks = {(layer.layer, side): every for layer in geometry for side in ("q", "k")}
    selection, transfer = Selection(heads), BlockingTransfer()
    plan = Wanted(selection, by_number(backbone.geometry), backbone.layer_of, transfer, backbone.device)
    observer = Observer(batch, picks, plan)
    with observer.open(pre=pre):
        backbone(transfer.upload(batch.input_ids(), backbone.device))
    vectors = {pair: states.cpu() for pair, states in observer.vectors.items()}
    rounded = rounds_states(backbone.model_config())
    allowed = STATES_ROUNDED if rounded else TOLERANCE.get(backbone.dtype, OTHERWISE)
    return Shown(batch, picks, heads, vectors, dims, allowed)


@torch.inference_mode()
def prove(model: VllmModel, shown: Shown) -> float:
    """How far the two are apart, at most, over the length of a head's vectors.

    Raises:
        UnsupportedModelError: farther than rounding explains, and where.
    """
    texts = [one.token_ids for one in shown.batch.documents]
    places = {pair: places_of(picks) for pair, picks in shown.picks.items()}
    model.run([text[:-NEW] for text in texts], shown.heads, places, NEW, only=int(texts[0][-1]))
    found = model.take(places, [len(text) for text in texts])
    worst = 0.0
    for (layer, kind), wanted in shown.vectors.items():
        dim = shown.dims[layer, kind]
        ours, theirs = (states.cpu().double().view(len(states), -1, dim) for states in (found[layer, kind], wanted))
        off = (ours - theirs).norm(dim=(0, 2)) / theirs.norm(dim=(0, 2)).clamp(min=1e-30)
        head = int(off.argmax())
        if not float(off[head]) <= shown.allowed:
            raise UnsupportedModelError(
                f"{kind} of layer {layer}, head {head} in vLLM is off from that in transformers by "
                f"{float(off[head]):.2%} of its length, where {shown.allowed:.2%} is rounding: choose engine=local"
            )
        worst = max(worst, float(off[head]))
    return worst


def rounds_states(config: Mapping[str, Any]) -> bool:
    """Whether linear layers of a quantised checkpoint round what they multiply too, as its config tells."""
    how = config.get("quantization_config") or {}
    groups = (how.get("config_groups") or {}).values()
    named = how.get("quant_method") == "fbgemm_fp8" or how.get("load_in_8bit") or how.get("activation_scheme")
    return bool(named or any(isinstance(one, Mapping) and one.get("input_activations") for one in groups))


def _texts(vocabulary: int, lengths: tuple[int, int]) -> list[Document]:
    """Different tokens, away from the special ones that most vocabularies begin with; then one again and again."""
    first = min(16, vocabulary // 2)
    ids = (np.arange(sum(lengths)) * 7 % max(1, vocabulary - first) + first).astype(np.int32)
    pieces = np.split(ids, [lengths[0]])
    last = np.full(NEW, ids[0], dtype=np.int32)
    return [
        Document(number, f"probe {number}", np.concatenate([piece, last]), False) for number, piece in enumerate(pieces)
    ]


def _every(batch: TokenBatch) -> Picks:
    lengths = [one.n_tokens for one in batch.documents]
    rows = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    return Picks(rows, positions, np.zeros_like(rows))
