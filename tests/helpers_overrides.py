"""The law of overrides over a whole config: every key of a text model is changed in turn, and all else compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from sniffer.models.architecture import build_config
from sniffer.models.config_keys import value_of
from transformers import AutoConfig, PretrainedConfig

from sniffer.errors import ConfigError

LEFT = ("id2label", "label2id", "model_type", "dtype", "num_labels", "problem_type", "per_layer_config")
LEFT += ("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder")
"""Keys that do not describe the model."""


def flat(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flat(value, (*path, str(key)))
    elif values not in ([], ()):
        yield path, list(values) if isinstance(values, tuple) else values


def differences(one: PretrainedConfig, other: PretrainedConfig) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """The values that two text models do not have in common, by path."""
    then, now = (dict(flat(config.get_text_config().to_dict())) for config in (one, other))
    return {path: (then.get(path), now.get(path)) for path in {*then, *now} if then.get(path) != now.get(path)}


def other_than(value: Any) -> Any:
    """A value of the same kind; None where there is no telling what else could be."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or None
    return value / 2 + 1e-3 if isinstance(value, float) else None


def changed_too_much(model_type: str) -> list[str]:
    """What is wrong with the default config of a type when one key of its text model at a time is overridden.

    Everything that differs has to be the key that was named, or what the config class makes of that key by itself;
    nothing of RoPE but what was named; and what was named has to be what it was named.
    """
    default = AutoConfig.for_model(model_type)
    found = []
    for key, value in default.get_text_config().to_dict().items():
        if key in LEFT or key.startswith("_") or (wanted := other_than(value)) is None:
            continue
        try:
            config = build_config(model_type, {key: wanted})
        except ConfigError as error:
            found += [f"{key}: {error}"] if "\n" in str(error) else []
            continue
        made = _of_itself(default.get_text_config(), key, wanted)
        for path, (then, now) in differences(default, config).items():
            derived = "rope_parameters" not in path and any(path in one and one[path] == now for one in made)
            longer = isinstance(then, list) and isinstance(now, list) and then[: len(now)] == now[: len(then)]
            if key not in path and not derived and not longer:
                found.append(f"{key}={wanted} changes {'.'.join(path)} from {then} to {now}")
        if value_of(config.get_text_config(), key) not in (wanted, None):
            found.append(f"{key}={wanted} has no effect")
    return found


def _of_itself(text: PretrainedConfig, key: str, value: Any) -> list[dict[tuple[str, ...], Any]]:
    """What a config class itself derives from a key: alone, and with what sets this config apart from its class."""
    made = []
    with suppress(Exception):  # of several libraries: not with this key alone
        made.append(dict(flat(type(text)(**{key: value}).to_dict())))
    with suppress(Exception):
        usual = type(text)().to_dict()
        apart = {name: one for name, one in text.to_dict().items() if name not in usual or usual[name] != one}
        made.append(dict(flat(type(text)(**{**apart, key: value}).to_dict())))
    return made
