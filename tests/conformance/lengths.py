"""How long a document may be, and with which others it may share a batch: what is proven of one family of that.

The limits that a config tells before any weight is read must be those of the model: called at its limit it runs, and
one token beyond it is refused before the forward, with the advice that fits. What a document's vectors are must not
depend on what else is in its batch, nor on what came before, even with RoPE that is scaled by the length.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sniffer.models.config_keys import ROPE, rope_of, value_of
from sniffer.models.layers import find_backbone
from sniffer.models.limits import limits_of
from sniffer.models.loaded import LoadedBackbone
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from sniffer.dataset.batching import batches
from sniffer.engine.lengths import token_limit
from sniffer.errors import ConfigError
from sniffer.tap import Seen, tap
from sniffer.types import Document, ModelLimits
from tests import tiny_families as tiny

LONGEST = 4096
"""A model that says it takes more than that is not called at its limit."""

ALIKE = 1e-4
"""Relative difference that another batch may make."""

Build = Callable[[Callable[[PretrainedConfig], None]], PreTrainedModel]
"""Makes a tiny model of a family, from a config that is changed before."""

FIT = re.compile(r"model\.config_overrides=\{(\w+): (\d+)\}")


def check_limits(model: PreTrainedModel, backbone: LoadedBackbone) -> str:
    """What the config tells of layers, heads and positions holds for the model."""
    limits = limits_of(model.config)
    if limits.layers is not None and max(layer.layer for layer in backbone.geometry) >= limits.layers:
        return f"it has more than the {limits.layers} layers that limits tell"
    if limits.query_heads is not None and max(layer.heads["q"] for layer in backbone.geometry) > limits.query_heads:
        return f"it has more than the {limits.query_heads} query heads that limits tell"
    most = limits.max_positions
    if most is None:
        return (
            "" if runs(backbone, 2 * tiny.SMALL["n_positions"]) else "it has a limit of length that limits do not tell"
        )
    if most <= LONGEST and not runs(backbone, most):
        return f"it does not run at its limit of {most} tokens"
    if wanted := refusal(limits, None, most):
        return wanted
    if "lower it" not in refusal(limits, most + 1, most):
        return f"{most + 1} tokens are not refused"
    key, rows = FIT.findall(refusal(limits, most + 1, most))[0]
    declared = value_of(model.config.get_text_config(), key)
    if int(rows) != declared + 1:
        return f"the advice to set {key}={rows} does not fit a model that has {declared}"
    # A model that runs on has no table that ends, and its limit is the number it declares.
    return "" if most == declared or (most < declared and not runs(backbone, most + 1)) else f"{most} is no limit of it"


def refusal(limits: ModelLimits, wanted: int | None, expected: int) -> str:
    """What is said to a run that wants so many tokens; empty where it gets as many as expected."""
    config: Any = SimpleNamespace(dataset=SimpleNamespace(max_tokens=wanted), generate=None)
    try:
        given = token_limit(config, limits)
    except ConfigError as error:
        return str(error)
    return "" if given == expected else f"documents would be cut to {given} tokens, not {expected}"


def runs(backbone: LoadedBackbone, tokens: int) -> bool:
    try:
        with torch.inference_mode():
            backbone(tiny.tiny_ids(1, tokens))
    except Exception:  # of upstream code: any
        return False
    return True


def check_batches(build: Build) -> str:
    """Each document has the vectors that it has alone, with RoPE scaled by the length where the family can do that."""
    try:
        backbone = LoadedBackbone(find_backbone(build(scale)))
        made_for = backbone.lengths.apart_from
        texts = documents(made_for or tiny.SMALL["n_positions"])
        # Shorter ones first: before a longer one, nothing has been scaled yet. Batches begin with the longest.
        rising = [vectors(backbone, [text], 1) for text in sorted(texts, key=lambda text: text.n_tokens)]
    except Exception:  # of upstream code: any; this family has no such scaling, or no RoPE
        return ""
    falling, together = vectors(backbone, texts, 1), vectors(backbone, texts, 1 << 20)
    for document, alone in ((text, one[text.example_id]) for text in texts for one in rising if text.example_id in one):
        if not all(torch.equal(a, b) for a, b in zip(alone, falling[document.example_id], strict=True)):
            return f"{document.n_tokens} tokens have other vectors after longer texts"
        for a, b in zip(alone, together[document.example_id], strict=True):
            worst = float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
            if not worst < ALIKE:
                return f"{document.n_tokens} tokens have vectors in a batch that differ by {worst:.1e}"
    return ""


def scale(config: PretrainedConfig) -> None:
    """Puts dynamic scaling in place of plain RoPE.

    Raises:
        LookupError: there is no plain RoPE.
    """
    text = config.get_text_config()
    # Some classes give all their configs the same mapping.
    text.rope_parameters = copy.deepcopy(value_of(text, ROPE))
    plain = [one for one in rope_of(text).values() if one.get("rope_type", "default") == "default"]
    if not plain:
        raise LookupError
    for one in plain:
        dict[str, Any].update(one, rope_type="dynamic", factor=4.0)  # type: ignore[arg-type]


def documents(made_for: int) -> list[Document]:
    """Texts of lengths on both sides of what a model was made for."""
    random = np.random.default_rng(0)
    sizes = [max(11, made_for + more) for more in (-1, -3, 0, 0, 1)]
    return [Document(n, str(n), random.integers(20, 150, size).astype(np.int32), False) for n, size in enumerate(sizes)]


def vectors(backbone: LoadedBackbone, texts: Sequence[Document], max_tokens: int) -> dict[int, list[Tensor]]:
    """The q and k of each document's own tokens, in batches of that many tokens."""
    found = {}
    for batch in batches(texts, max_tokens, 0, backbone.lengths):
        seen: list[Seen] = []
        with torch.inference_mode(), tap(seen.append):
            backbone(torch.from_numpy(batch.input_ids()))
        states = [states for event in seen if event.module in backbone.layer_of for states in (event.q, event.k)]
        for row, document in enumerate(batch.documents):
            found[document.example_id] = [one[row, :, : document.n_tokens].clone() for one in states]
    return found
