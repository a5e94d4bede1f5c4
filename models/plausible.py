"""Values that no model can have, met before anything is built of them: sizes below 1, heads that do not divide,
rotary parameters out of range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from sniffer.errors import ConfigError

from .config_keys import ROPE, rope_of, value_of

SIZES: tuple[str, ...] = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "max_position_embeddings", "original_max_position_embeddings"),
    *("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "n_ctx", "d_model", "d_ff", "d_kv", "n_heads"),
    *("n_layers", "num_layers", "num_heads", "max_seq_len", "max_target_positions", "decoder_layers"),
    *("num_decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "ffn_dim", "num_kv_heads"),
)
"""Keys that count what every model has at least one of."""

COUNTS = ("_size", "_dim", "_heads", "_layers", "_experts", "_window", "_rank", "_embeddings", "_positions")
"""Ends of keys that count something, which may be nothing."""


def check_named(named: Mapping[str, Any], within: str = "") -> None:
    """Refuses sizes that are not whole numbers above 0, and counts below 0.

    Raises:
        ConfigError: naming the key.
    """
    for key, value in named.items():
        if isinstance(value, Mapping):
            check_named(value, f"{within}{key}.")
        values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if key in SIZES and not all(one is None or (_is_whole(one) and one > 0) for one in values):
            raise ConfigError(f"model.config_overrides.{within}{key}={value!r} must be a whole number of 1 or more")
        if key.endswith(COUNTS) and any(_is_whole(one) and one < 0 for one in values):
            raise ConfigError(f"model.config_overrides.{within}{key}={value!r} must not be below 0")


def check_resolved(before: PretrainedConfig, after: PretrainedConfig) -> None:
    """Refuses a config with overrides whose heads do not divide, or whose rotary parameters are out of range.

    Raises:
        ConfigError: naming the key.
    """
    text = after.get_text_config()
    _check_heads(before.get_text_config(), text)
    for kind, rope in rope_of(text).items():
        _check_rope(text, rope, f"{ROPE}.{kind}." if kind else f"{ROPE}.")


def _check_heads(before: PretrainedConfig, after: PretrainedConfig) -> None:
    """What divided before has to divide again."""
    for parts, whole in (("num_key_value_heads", "num_attention_heads"), ("num_attention_heads", "hidden_size")):
        then, now = ([value_of(one, key) for key in (parts, whole)] for one in (before, after))
        if not all(_is_whole(value) and value > 0 for value in (*then, *now)):
            continue
        # A head whose size is a key of its own need not be a part of the width.
        if whole == "hidden_size" and value_of(before, "head_dim") not in (None, then[1] // then[0]):
            continue
        if then[1] % then[0] == 0 and now[1] % now[0]:
            raise ConfigError(
                f"model.config_overrides: {whole}={now[1]} is no multiple of {parts}={now[0]}: change one of them"
            )


def _check_rope(config: PretrainedConfig, rope: Mapping[str, Any], within: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope.get("rope_type", "default")
    own = [name for name in dir(type(config)) if name.startswith("_validate_") and name.endswith("_rope_parameters")]
    kinds = {"default", *ROPE_INIT_FUNCTIONS, *(name[len("_validate_") : -len("_rope_parameters")] for name in own)}
    if kind not in kinds:
        known = ", ".join(sorted(kinds))
        raise ConfigError(
            f"model.config_overrides: {within}rope_type={kind!r} is none that transformers knows: {known}"
        )
    for key in ("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"):
        value = rope.get(key)
        if value is not None and not (_is_number(value) and 0 < value < math.inf):
            raise ConfigError(f"model.config_overrides: {within}{key}={value!r} must be a number above 0")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
