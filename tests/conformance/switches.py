"""Settings of a config that may decide whether a family is covered, each tried with its other values.

A decoder can be configured as an encoder, which is not causal, or with attention over blocks, which no rule knows. What
is found here is said in docs/families.md; nothing else depends on it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from sniffer.models import finder
from sniffer.models.architecture import override
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from transformers import PretrainedConfig

from sniffer.errors import UnsupportedModelError
from tests import tiny_families as tiny
from tests.conformance.checks import built, one_line

SWITCHES: dict[str, tuple[Hashable, ...]] = {
    "is_decoder": (True, False),
    "is_causal": (True, False),
    "add_cross_attention": (False, True),
    "use_bidirectional_attention": (False, True, None, "vision", "all"),
    "attention_type": ("original_full", "block_sparse"),
    "alibi": (False, True),
}
"""Keys of configs, and the values that mean something."""


def switches_of(model_type: str) -> dict[str, Any]:
    """The keys among them that a family's config has, those of an inner config by a dotted name."""
    return {"switches": {key: SWITCHES[key.rpartition(".")[2]] for key in _keys(tiny.tiny_config(model_type))}}


def _keys(config: PretrainedConfig) -> Iterator[str]:
    """Keys of a text_config are given by their own name, those of other inner configs by a dotted one."""
    text = tiny.text_of(config) or config
    inner = [f"{name}." for name, part in vars(config).items() if part is text and name != "text_config"]
    yield from ("".join([*inner[:1], key]) for key in SWITCHES if key in text.to_dict())


def run_switched(model_type: str, key: str, value: Any) -> dict[str, Any]:
    """Whether a family is tapped with this value of a key; `not built` where the value does not fit it."""
    finder.install()
    *path, last = key.split(".")
    change: dict[str, Any] = {last: value}
    for name in reversed(path):
        change = {name: change}
    try:
        model = built(override(tiny.tiny_config(model_type), change))
    except Exception as error:  # of configs and of upstream code: any
        return {"outcome": "not built", "reason": one_line(error)}
    try:
        LoadedBackbone(find_backbone(model))
    except UnsupportedModelError as error:
        return {"outcome": "refused", "reason": one_line(error)}
    return {"outcome": "tapped"}
