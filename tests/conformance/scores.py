"""Logits and probabilities from q, k and the manifest alone (`run.scores`), of one family, at every pair of positions.

They are compared with statistics of attention, whose buckets are single positions here: those are proven against what
attention returned, and borne out by the weights that it returns in a process without taps. Facts are found by a
shorter probe and go through JSON, as in a manifest. Windows and chunks are made to end within the text and beyond the
probe, so that nothing but what the manifest tells can know of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from torch import Tensor
from transformers import PretrainedConfig

from sniffer.errors import RunError, UnsupportedModelError
from sniffer.forward.attention.facts import score_facts
from sniffer.reader.scores import logits_of
from sniffer.tap import Seen, tap
from sniffer.types import LayerGeometry, ScoreFacts
from tests import tiny_families as tiny
from tests.helpers_attention import batch_of, captured

TOKENS, WINDOW = 40, 16
"""Of the text, and of windows and chunks in it; the probe that facts are found by is shorter than either."""
EXACT, USUAL = 1e-5, 4.0
"""As of statistics: the largest difference, where logits are no larger than usual."""
REFUSED = "refused: "


def narrowed(config: PretrainedConfig) -> None:
    """Has every window and chunk of attention in a config end at WINDOW."""
    text = tiny.text_of(config) or config
    for name, value in text.to_dict().items():
        wide = isinstance(value, int) and not isinstance(value, bool) and value > WINDOW
        if wide and ("window" in name or "attention_chunk" in name):
            setattr(text, name, WINDOW)


def scores_of(build: Callable[..., Any], model_type: str) -> str:
    """Empty where all agree; else what does not, or, after `refused`, why nothing is said."""
    try:
        backbone = LoadedBackbone(find_backbone(build(model_type, narrowed)))
    except Exception:  # of configs and of upstream code: any; as it is, the family has been built before
        backbone = LoadedBackbone(find_backbone(build(model_type)))
    ids = tiny.tiny_ids(batch=1, seq=TOKENS)
    found, refused = as_told(backbone), {}
    seen: list[Seen] = []
    with torch.inference_mode(), tap(seen.append):
        backbone(ids)
    shown = {backbone.layer_of[event.module]: event for event in seen if event.module in backbone.layer_of}
    for number, (layer, facts) in found.items():
        if facts.missing:
            refused[number] = facts.missing
        elif wrong := _differs(backbone, layer, facts, shown[number], ids):
            return f"layer {number}: {wrong}"
    if not refused:
        return ""
    return f"{REFUSED}{len(refused)} of {len(found)} layers: {next(iter(refused.values()))}"


def as_told(backbone: LoadedBackbone) -> dict[int, tuple[LayerGeometry, ScoreFacts]]:
    """What a manifest tells of each layer."""
    facts, told = score_facts(backbone), {}
    for layer in backbone.geometry:
        scaling, one = facts[layer.layer]
        plain = json.loads(json.dumps([asdict(replace(layer, scaling=scaling)), one.as_json()]))
        told[layer.layer] = LayerGeometry(**plain[0]), ScoreFacts.from_json(plain[1])
    return told


def _differs(backbone: LoadedBackbone, layer: LayerGeometry, facts: ScoreFacts, event: Seen, ids: Tensor) -> str:
    names = ("lse", "max_logit", "mass")
    try:
        exact = captured(backbone, batch_of(ids), statistics=names, layers=[layer.layer])[layer.layer]
    except UnsupportedModelError as error:
        return f"scores are told of a layer that has no statistics: {error}"
    places = np.arange(ids.shape[1], dtype=np.int32)
    for head in range(layer.heads["q"]):
        q, k = event.q[0, head].numpy(), event.k[0, layer.key_head(head)].numpy()
        try:
            logits = logits_of(layer, facts, head, q, k, places, places)
        except RunError as error:
            return str(error)
        sink = [] if facts.sinks is None else [np.full((len(places), 1), facts.sinks[head])]
        lse, mass = exact["lse"][:, head], exact["mass"][:, head]
        off = {
            "logits": np.abs(logits.max(1) - exact["max_logit"][:, head]).max(),
            "lse": np.abs(logsumexp(np.concatenate([logits, *sink], axis=1), axis=1) - lse).max(),
            "probabilities": np.abs(np.exp(logits - lse[:, None]) - mass).max(),
        }
        allowed = EXACT * max(1.0, float(np.abs(exact["max_logit"]).max()) / USUAL)
        if wrong := {name: float(f"{far:.2g}") for name, far in off.items() if not far <= allowed}:
            return f"query head {head} differs by {wrong}"
    return ""
