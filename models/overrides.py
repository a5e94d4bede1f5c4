"""Overrides of a config: what is named changes, and nothing else.

An override is as if it had been written into the checkpoint's config file. What the file does not say, the config class
derives, so that a head size may follow a width; what it does say stays, and so do the numbers of RoPE, which no shape
of a weight would betray. A config class has ways of its own to read older spellings (`rope_scaling` in place of
`rope_parameters` loses the base): they are translated before, and the outcome is compared with the
config as it was. Whatever else has changed is an error that shows it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from sniffer.errors import ConfigError, first_line

from .config_keys import ROPE, has, leaves, merged, own_name, value_of
from .plausible import check_named, check_resolved
from .rope_words import ORIGINAL, SCALING, TWICE, is_of_rope, named_of_rope

LENGTH = "num_hidden_layers"
BY_LAYER = "per_layer_config"
"""Where a config keeps the values that differ by layer."""

OF_ALL = ("architectures", "_token_id")
"""Ends of keys whose lists are not by layer, however many entries they have."""

OF_DECODERS = {
    LENGTH: ("decoder_layers", "num_decoder_layers"),
    "num_attention_heads": ("decoder_attention_heads",),
}
"""What encoder-decoders call a decoder's, where the usual name is the encoder's."""

FROM_WHERE = ("_name_or_path", "_commit_hash")
"""What a config knows of its origin, of which its file says nothing."""

Values = Mapping[str, Any]
Path = tuple[str, ...]


def override(config: PretrainedConfig, overrides: Values, written: Values | None = None) -> PretrainedConfig:
    """A config with some keys replaced; nested mappings are merged, per-layer lists follow a new depth.

    Args:
        written: what the checkpoint's file says; without it, everything in `config` counts as written.

    Raises:
        ConfigError: an unknown key, a value that cannot be, or a change of what was not named.
    """
    if not overrides:
        return config
    named = _in_own_words(config, _placed(config, overrides))
    check_named(named)
    said = _said(config, config.to_dict() if written is None else written, named)
    try:
        after = type(config).from_dict(_edited(config, named, said))
    except Exception as error:  # configs validate themselves with exceptions of several libraries
        raise ConfigError(
            f"model.config_overrides do not fit {config.model_type}: {first_line(error, lines=2)}"
        ) from error
    for name in FROM_WHERE:
        if name in vars(config):
            setattr(after, name, vars(config)[name])
    _check_nothing_else(config, after, named, said)
    _check_effect(after, named)
    check_resolved(config, after)
    return after


def _placed(config: PretrainedConfig, overrides: Values) -> dict[str, Any]:
    """Moves keys of the text model to where its config lies inside; keys that both have, and alike, go to both.

    Raises:
        ConfigError: neither has a key.
    """
    text, path = _text_of(config)
    placed: dict[str, Any] = {}
    for key, value in overrides.items():
        inner, outer = _knows(text, key), _knows(config, key)
        if not (inner or outer):
            raise _unknown(config, key)
        of_text = bool(path) and inner and key not in config.sub_configs
        alike = of_text and key in vars(config) and value_of(config, key) == value_of(text, key)
        if of_text:
            nested: Any = {key: value}
            for name in reversed(path):
                nested = {name: nested}
            placed = merged(placed, nested)
        if alike or not of_text:
            placed[key] = value if not isinstance(placed.get(key), dict) else merged(placed[key], value)
    return placed


def _text_of(config: PretrainedConfig) -> tuple[PretrainedConfig, Path]:
    """The text model's config, and where it lies in the whole: nowhere if it is the whole, or there are several."""
    try:
        text = config.get_text_config()
    except ValueError:
        return config, ()
    return text, _path_to(config, text) or ()


def _path_to(config: PretrainedConfig, wanted: PretrainedConfig) -> Path | None:
    if config is wanted:
        return ()
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig) and (path := _path_to(value, wanted)) is not None:
            return (name, *path)
    return None


def _said(config: PretrainedConfig, written: Values, named: Values) -> dict[str, Any]:
    """What a file says, and, of inner configs that it leaves out and that are named, what would not come of itself."""
    said = copy.deepcopy(dict(written))
    for name, inner in vars(config).items():
        if isinstance(inner, PretrainedConfig) and isinstance(named.get(name), Mapping):
            its = said.get(name)
            said[name] = _said(inner, its if isinstance(its, Mapping) else _apart(inner), named[name])
    return said


def _apart(config: PretrainedConfig) -> dict[str, Any]:
    """The fewest values from which a config's class makes it."""
    values = config.to_dict()
    try:
        usual = type(config)().to_dict()
        apart = {key: value for key, value in values.items() if key not in usual or usual[key] != value}
        made = type(config)(**copy.deepcopy(apart)).to_dict()
    except Exception:  # of several libraries: a class without a valid default
        return values
    return apart | {key: value for key, value in values.items() if made.get(key) != value}


def _knows(config: PretrainedConfig, key: str) -> bool:
    if key in (SCALING, "rope_theta") and has(config, ROPE):
        return True
    return has(config, key) and key != SCALING


def _unknown(config: PretrainedConfig, key: str, within: str = "") -> ConfigError:
    return ConfigError(
        f"model.config_overrides.{within}{key} is no key of a {config.model_type} config: see {type(config).__name__}"
    )


def _in_own_words(config: PretrainedConfig, overrides: Values, within: str = "") -> dict[str, Any]:
    """Overrides by the names that the config itself uses, older spellings of RoPE translated.

    Raises:
        ConfigError: a nested key is unknown, or it cannot be told what is meant.
    """
    named: dict[str, Any] = {}
    for key, value in overrides.items():
        inner = value_of(config, key)
        if not _knows(config, key):
            raise _unknown(config, key, within)
        if isinstance(inner, PretrainedConfig) and isinstance(value, Mapping):
            named[key] = _in_own_words(inner, value, f"{within}{key}.")
        elif is_of_rope(config, key):
            rope = named_of_rope(config, key, value)
            kept_outside = {name: rope[name] for name in TWICE if name in rope and name in vars(config)}
            named = merged(named, {ROPE: rope, **kept_outside})
        else:
            named[_not_the_encoders(config, key)] = value
    return named


def _not_the_encoders(config: PretrainedConfig, key: str) -> str:
    """The config's own name of a key, which must not count in an encoder what is captured from a decoder."""
    own = own_name(config, key)
    for decoders in OF_DECODERS.get(key, ()):
        if has(config, decoders) and own_name(config, decoders) != own:
            raise ConfigError(
                f"model.config_overrides.{key} is the encoder's in a {config.model_type} config: name {decoders}"
            )
    return own


def _edited(config: PretrainedConfig, named: Values, written: Values) -> dict[str, Any]:
    """What the file would say with the overrides written into it."""
    edited = copy.deepcopy(dict(written))
    for key, value in named.items():
        inner, said = value_of(config, key), edited.get(key)
        if isinstance(inner, PretrainedConfig) and isinstance(value, Mapping):
            edited[key] = _edited(inner, value, said if isinstance(said, Mapping) else {})
        elif key == ROPE:
            edited.pop(SCALING, None)
            edited[key] = merged(copy.deepcopy(inner) or {}, value)
        elif isinstance(value, Mapping):
            there = said if isinstance(said, Mapping) else inner
            edited[key] = merged(there, value) if isinstance(there, Mapping) else copy.deepcopy(dict(value))
        else:
            edited[key] = value
    return edited | _follow_depth(config, named, edited)


def _follow_depth(config: PretrainedConfig, named: Values, edited: Values) -> dict[str, Any]:
    """Lists with one entry per layer, for a changed number of layers: layer n stays what it was."""
    depth, old_depth = named.get(own_name(config, LENGTH)), value_of(config, LENGTH)
    if not isinstance(depth, int) or depth == old_depth:
        return {}
    follow: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        listed = isinstance(value, (list, tuple)) and len(value) == old_depth
        if listed and key not in named and not key.startswith("_") and not key.endswith(OF_ALL):
            follow[key] = list(value[:depth]) if depth <= len(value) else None
    own = edited.get(BY_LAYER)
    if isinstance(own, Mapping) and BY_LAYER not in named:
        follow[BY_LAYER] = {layer: values for layer, values in own.items() if int(layer) < depth}
    return follow


def _check_nothing_else(before: PretrainedConfig, after: PretrainedConfig, named: Values, written: Values) -> None:
    """Refuses an outcome that differs from the config in what was not named and does not follow.

    Raises:
        ConfigError: showing what else has changed.
    """
    then, now = ({p: v for p, v in leaves(one.to_dict()) if v != {}} for one in (before, after))
    changed = [path for path in dict.fromkeys([*then, *now]) if then.get(path) != now.get(path)]
    asked = [path for path, _ in leaves(named)]
    others = [path for path in changed if not any(path[: len(one)] == one for one in asked)]
    others = [path for path in others if not _follows(path, then, now, named, written)]
    if others:
        shown = "; ".join(f"{'.'.join(path)}: {then.get(path)}, now {now.get(path)}" for path in others[:4])
        more = f"; and {len(others) - 4} more" if len(others) > 4 else ""
        raise ConfigError(f"model.config_overrides change more than they name ({shown}{more}): name these too")


def _follows(path: Path, then: Mapping[Path, Any], now: Mapping[Path, Any], named: Values, written: Values) -> bool:
    """Whether a key may change that was not named, because it is derived from one that was."""
    old, new = then.get(path), now.get(path)
    if isinstance(old, list) and isinstance(new, list) and old and new:
        short = min(len(old), len(new))
        if len(old) != len(new) and old[:short] == new[:short]:
            return True
    if ROPE in path:
        # What was trained on is the length before any override of it.
        lengths = [value for other, value in then.items() if other[-1] == "max_position_embeddings"]
        return old is None and (path[-1], new) in [("rope_type", "default"), *((ORIGINAL, one) for one in lengths)]
    if BY_LAYER in path:
        return True
    said: Any = written
    for key in path:
        said = said.get(key) if isinstance(said, Mapping) else None
    return said is None


def _check_effect(after: PretrainedConfig, named: Values) -> None:
    """Refuses an override that the config does not heed.

    Raises:
        ConfigError: naming it.
    """
    for path, wanted in _single(after, named):
        found: Any = after
        for key in path:
            found = _inside(found, key)
        if wanted is not None and found is not VARIES and not _alike(found, wanted):
            raise ConfigError(
                f"model.config_overrides.{'.'.join(path)}={wanted!r} has no effect: a {after.model_type} config"
                f" makes {found!r} of it"
            )


VARIES = object()
"""In place of a value that differs by layer."""


def _inside(owner: Any, key: str) -> Any:
    if isinstance(owner, Mapping):
        return owner.get(key)
    try:
        return getattr(owner, key, None)
    except RuntimeError:  # transformers' word for a key whose value differs by layer
        return VARIES


def _single(config: PretrainedConfig, named: Values, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Named values by path, down through inner configs and the rotary parameters."""
    for key, value in named.items():
        inner = value_of(config, key)
        if isinstance(inner, PretrainedConfig) and isinstance(value, Mapping):
            yield from _single(inner, value, (*path, key))
        elif key == ROPE:
            yield from leaves(value, (*path, key))
        elif not isinstance(value, Mapping):
            yield (*path, key), value


def _alike(found: Any, wanted: Any) -> bool:
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)):
        return list(found) == list(wanted)
    return bool(found == wanted) or str(found).removeprefix("torch.") == str(wanted)
