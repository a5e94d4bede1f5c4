"""A model's config: read from a checkpoint or built from its type, with the user's overrides put in; and its class.

Overrides are typed by users, so an unknown key is refused by name: a config class would take it silently.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from sniffer.errors import CheckpointError, ConfigError, first_line

from .overrides import override


def read_config(source: str, overrides: Mapping[str, Any], **options: Any) -> PretrainedConfig:
    """The config of a checkpoint folder or hub id, with overrides; `options` are those of from_pretrained.

    Raises:
        CheckpointError: transformers cannot read it.
        ConfigError: an override names no key of this config, its value does not fit, or it would change more.
    """
    try:
        config = AutoConfig.from_pretrained(source, **options)
        written = _written(source, options) if overrides else {}
    except Exception as error:  # configs validate themselves with exceptions of several libraries
        raise CheckpointError(f"the config of {source} cannot be read: {first_line(error, lines=2)}") from error
    return override(config, overrides, written)


def build_config(
    model_type: str, overrides: Mapping[str, Any], stated: Mapping[str, Any] = MappingProxyType({})
) -> PretrainedConfig:
    """The config of an architecture, with overrides; touches neither disk nor network.

    Args:
        stated: what a checkpoint's config.json says, as far as it is known; the rest is the default of the class.

    Raises:
        ConfigError: transformers knows no such type, or a number or an override does not fit.
    """
    try:
        default = AutoConfig.for_model(model_type, **copy.deepcopy(dict(stated)))
    except ValueError as error:
        raise ConfigError(f"model.model_type={model_type!r} is no architecture that transformers knows") from error
    except Exception as error:  # of several libraries: some defaults are not valid
        if stated:
            raise ConfigError(f"model.architecture is no {model_type}: {first_line(error, lines=2)}") from error
        raise ConfigError(
            f"model.model_type={model_type} has no default config of its own ({first_line(error, lines=2)}): give"
            " model.checkpoint a folder with a config.json"
        ) from error
    return override(default, overrides, stated)


def type_of(config: PretrainedConfig, dtype: str) -> torch.dtype:
    """Of the weights that are made by a config; `dtype` as in the config group `model`."""
    own = getattr(config.get_text_config(), "dtype", None) or torch.float32
    kind: torch.dtype = own if dtype == "auto" else getattr(torch, dtype)
    return kind


def auto_class(config: PretrainedConfig) -> Any:
    """The class a checkpoint of this kind was saved from, whose weight names therefore fit."""
    remote = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping or auto.__name__ in remote:
            return auto
    return AutoModel


def _written(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint's file says, before a config class has derived the rest."""
    where = {key: value for key, value in options.items() if key != "trust_remote_code"}
    written: dict[str, Any] = PretrainedConfig.get_config_dict(source, **where)[0]
    return written
