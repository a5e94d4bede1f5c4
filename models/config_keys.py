"""Keys of a config: whether it has one, what its value is, and which rotary parameters it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

ROPE = "rope_parameters"

POSITION_KEYS = ("max_position_embeddings", "max_target_positions", "max_seq_len", "n_positions", "n_ctx")
"""How families call the number of positions."""


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


def own_name(config: PretrainedConfig, key: str) -> str:
    """How a config itself calls a key: n_embd, say, for hidden_size."""
    return str((type(config).attribute_map or {}).get(key, key))


def rope_of(config: PretrainedConfig) -> dict[str, Mapping[str, Any]]:
    """The rotary parameters by type of layer; under an empty name where all layers share them."""
    rope = value_of(config, ROPE)
    if not isinstance(rope, Mapping) or not rope:
        return {}
    by_type = {str(kind): value for kind, value in rope.items() if isinstance(value, Mapping)}
    return by_type or {"": rope}


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values of a nested mapping by their path; an empty mapping is a value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    else:
        yield path, value


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with changes put in, nested ones merged."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
