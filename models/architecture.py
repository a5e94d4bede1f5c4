"""A model's config: read from a checkpoint or built from its type, with the user's overrides put in.

Overrides are typed by users, so an unknown key is refused by name: a config class would take it silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from sniffer.errors import CheckpointError, ConfigError

LENGTH = "num_hidden_layers"
BY_LAYER = "per_layer_config"
"""Where a config keeps the values that differ by layer."""


def read_config(source: str, overrides: Mapping[str, Any], **options: Any) -> PretrainedConfig:
    """The config of a checkpoint folder or hub id, with overrides; `options` are those of from_pretrained.

    Raises:
        CheckpointError: transformers cannot read it.
        ConfigError: an override names no key of this config, or its value does not fit.
    """
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # configs validate themselves with exceptions of several libraries
        raise CheckpointError(f"the config of {source} cannot be read: {_first_line(error)}") from error
    return override(config, overrides)


def build_config(model_type: str, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """The default config of an architecture, with overrides; touches neither disk nor network.

    Raises:
        ConfigError: transformers knows no such type, or an override does not fit.
    """
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ConfigError(f"model.model_type={model_type!r} is no architecture that transformers knows") from error
    _known(default, overrides)
    placed = _placed(default, overrides)
    try:
        nested = {
            k: v for k, v in placed.items() if isinstance(v, Mapping) and isinstance(value_of(default, k), Mapping)
        }
        rest = {k: v for k, v in placed.items() if k not in nested}
        config = AutoConfig.for_model(model_type, **rest)
    except Exception as error:  # configs validate themselves with exceptions of several libraries
        raise ConfigError(f"model.config_overrides do not fit {model_type}: {_first_line(error)}") from error
    return override(config, nested)


def override(config: PretrainedConfig, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """A config with some keys replaced; nested mappings are merged, per-layer lists cut to a new depth.

    Raises:
        ConfigError: an unknown key, or a value the config refuses.
    """
    if not overrides:
        return config
    _known(config, overrides)
    placed = _placed(config, overrides)
    merged = _merged(config.to_dict(), placed)
    if "text_config" in merged and isinstance(merged["text_config"], dict):
        _cut_lists(merged["text_config"], placed.get("text_config", {}), config.get_text_config())
    _cut_lists(merged, placed, config)
    try:
        return type(config).from_dict(merged)
    except Exception as error:  # configs validate themselves with exceptions of several libraries
        raise ConfigError(f"model.config_overrides do not fit {config.model_type}: {_first_line(error)}") from error


def has(config: PretrainedConfig, key: str) -> bool:
    """Whether a config has this key, for all layers or with a value for each."""
    try:
        return hasattr(config, key)
    except RuntimeError:  # transformers' word for a key whose value differs by layer
        return True


def value_of(config: PretrainedConfig, key: str) -> Any:
    """The value of a key; None where the config has none, or one for each layer."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


def _known(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    text = config.get_text_config()
    for key in overrides:
        if not has(config, key) and not has(text, key):
            raise ConfigError(
                f"model.config_overrides.{key} is no key of a {config.model_type} config: see {type(config).__name__}"
            )


def _placed(config: PretrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Moves keys of the text model into `text_config`, for configs that have one."""
    text = config.get_text_config()
    if text is config or not hasattr(config, "text_config"):
        return dict(overrides)
    inner = {key: value for key, value in overrides.items() if has(text, key) and key not in config.sub_configs}
    outer = {key: value for key, value in overrides.items() if key not in inner}
    return _merged(outer, {"text_config": inner}) if inner else outer


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _cut_lists(merged: dict[str, Any], changes: Mapping[str, Any], before: PretrainedConfig) -> None:
    """Lists with one entry per layer follow a changed number of layers, unless they were given too."""
    depth, old_depth = changes.get(LENGTH), getattr(before, LENGTH, None)
    if depth is None or depth == old_depth:
        return
    for key, value in list(merged.items()):
        if isinstance(value, (list, tuple)) and len(value) == old_depth and key not in changes:
            merged[key] = list(value[:depth]) if depth <= len(value) else None
    own = merged.get(BY_LAYER)
    if isinstance(own, Mapping) and BY_LAYER not in changes:
        merged[BY_LAYER] = {layer: values for layer, values in own.items() if int(layer) < depth}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
