"""How an override may speak of RoPE: the older spellings, as what `rope_parameters` calls them.

Releases of transformers before 5 had `rope_scaling` and, beside it, `rope_theta`; files and habits still have. Read by
a config class, a `rope_scaling` takes the place of all rotary parameters, and the base is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

from sniffer.errors import ConfigError

from .config_keys import ROPE, has, rope_of

SCALING = "rope_scaling"
ORIGINAL = "original_max_position_embeddings"
TWICE = ("rope_theta", "partial_rotary_factor", "max_position_embeddings", ORIGINAL)
"""Numbers of RoPE that some configs keep a second time, outside; to name one is to name both."""


def is_of_rope(config: PretrainedConfig, key: str) -> bool:
    """Whether a key names rotary parameters, or a number that is kept among them."""
    if key in (ROPE, SCALING):
        return True
    return key in TWICE and (any(key in one for one in rope_of(config).values()) or _is_base(config, key))


def _is_base(config: PretrainedConfig, key: str) -> bool:
    return key == "rope_theta" and has(config, ROPE)


def named_of_rope(config: PretrainedConfig, key: str, value: Any) -> dict[str, Any]:
    """What an override names of `rope_parameters`; it is merged into what is there.

    Raises:
        ConfigError: parameters differ by type of layer and no type is named, or a parameter is unknown.
    """
    there = rope_of(config)
    given = {key: value} if key in TWICE else _own_spelling(key, value)
    if "" in there or not there:
        _check_names(config, given, there.get("", {}))
        return given
    flat = [name for name in given if name not in there]
    if flat:
        raise ConfigError(
            f"model.config_overrides.{key}: the rotary parameters of this model differ by type of layer, and"
            f" {', '.join(flat)} could mean any: name one of {', '.join(there)}, such as"
            f" {{{ROPE}: {{{next(iter(there))}: {{...}}}}}}"
        )
    by_type = {kind: _own_spelling(f"{key}.{kind}", values) for kind, values in given.items()}
    for kind, values in by_type.items():
        _check_names(config, values, there[kind])
    return by_type


def _own_spelling(key: str, value: Any) -> dict[str, Any]:
    """Rotary parameters by their names of today; none at all are the default ones, with the base that is there."""
    if value is None:
        return {"rope_type": "default"}
    if not isinstance(value, Mapping):
        raise ConfigError(f"model.config_overrides.{key}={value!r} must be a mapping, such as {{rope_theta: 10000.0}}")
    return {"rope_type" if name == "type" else str(name): inner for name, inner in value.items()}


def _check_names(config: PretrainedConfig, names: Iterable[str], there: Mapping[str, Any]) -> None:
    """Refuses misspelt parameters, of which transformers would only warn."""
    from transformers.modeling_rope_utils import RopeParameters

    more = getattr(config, "ignore_keys_at_rope_validation", None) or ()
    known = {*RopeParameters.__annotations__, *there, *more}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"model.config_overrides.{ROPE}.{name} is no rotary parameter of a {config.model_type} config: it has"
                f" {', '.join(sorted(known))}"
            )
