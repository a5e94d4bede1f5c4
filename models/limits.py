"""What a config tells of a model before its weights are read: how many layers, heads and positions there are.

Layers and heads are at most these: a number that is too small would refuse what the model has, one that is too large
is met when the model is loaded. Positions are exact, since a text is cut to them: a table of positions is as long as
it is, and a model that has none was trained on so many. Some tables leave rows out before the first position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from sniffer.errors import UnsupportedModelError
from sniffer.types import ModelLimits

from .architecture import auto_class
from .config_keys import POSITION_KEYS, rope_of, value_of

LAYER_KEYS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
"""How families count the layers of a decoder; of encoder-decoders the last one is the encoder's."""

HEADS = "attention_heads"
"""What keys that count query heads end with; some configs have several, for several kinds of layers."""


def limits_of(config: PretrainedConfig, *, trust_remote_code: bool = False) -> ModelLimits:
    """The limits of a checkpoint's text model."""
    text = config.get_text_config()
    key = next((key for key in POSITION_KEYS if _count(value_of(text, key))), POSITION_KEYS[0])
    rows = _count(value_of(text, key))
    scalings = list(rope_of(text).values())
    before = 0 if scalings or rows is None else _rows_before_positions(config, rows, trust_remote_code)
    positions = None if rows is None else rows - before
    factors = [one["factor"] for one in scalings if "dynamic" in str(one.get("rope_type")) and one.get("factor")]
    heads = value_of(text, "num_attention_heads")
    return ModelLimits(
        layers=_layers(text),
        query_heads=_most_heads(text),
        key_heads=_count(value_of(text, "num_key_value_heads") or heads),
        max_positions=positions,
        reach=int(min(factors) * positions) if factors and positions else None,
        position_key=key,
        rows_before=before,
        rope=bool(scalings),
        vocabulary=_count(value_of(text, "vocab_size")),
    )


def _layers(text: PretrainedConfig) -> int | None:
    counts = [_count(value_of(text, key)) for key in LAYER_KEYS]
    return next((count for count in counts if count is not None), None)


def _most_heads(text: PretrainedConfig) -> int | None:
    """Query heads of any layer, at most; None where the config may count them otherwise."""
    if not _count(value_of(text, "num_attention_heads")):
        return None
    names = [*text.to_dict(), "num_attention_heads"]
    return max(_count(value_of(text, name)) or 0 for name in names if name.endswith(HEADS))


def _rows_before_positions(config: PretrainedConfig, rows: int, trust_remote_code: bool) -> int:
    """Rows of a table of positions that no token uses: where it has one for padding, positions begin after that."""
    if not isinstance(value_of(config.get_text_config(), "pad_token_id"), int):
        return 0
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        words = model.get_input_embeddings()
    except Exception:  # of upstream code: any; loading will say what is wrong
        return 0
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and part is not words]
    paddings = [part.padding_idx for part in tables if part.num_embeddings == rows and part.padding_idx is not None]
    return max(paddings, default=-1) + 1


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def check_writes(config: PretrainedConfig, title: str, *, wanted: bool = True) -> None:
    """Raises UnsupportedModelError, before any weight is read, for a model that does not write texts."""
    if not wanted:
        return
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{title} is an encoder and a decoder: only decoders go on with prompts (generate)")
    if auto_class(config).__name__ == "AutoModel":
        raise UnsupportedModelError(f"{title} has no head that says which token comes next: leave generate out")
