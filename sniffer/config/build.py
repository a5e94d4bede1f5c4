"""Constructor calls written down: from `_target_` and fields to an object, or to one line that says why not.

A YAML in conf/sampler/ names a class in `_target_`; its other keys are the class's fields. The class comes
from this project's own packages, or from those that the command line puts in `trusted_targets`; where it is a
dataclass, keys and types are checked against its fields. A `_target_` further down is data, never called.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from sniffer.errors import ConfigError, SnifferError, first_line

TRUSTED = ("sniffer.", "models.", "experiments.")
"""Prefixes of `_target_` that need no opting in."""

PARTS = ("models.", "experiments.")
"""Of this package, which configurations name without it."""


def build(node: Any, what: str, trusted: Sequence[str] = TRUSTED, role: Sequence[str] = ()) -> Any:
    """Makes the object that a `_target_` and its fields describe.

    Args:
        node: a mapping with `_target_`, the dotted name of a class; the rest are its arguments. A
            dataclass has its keys and types checked against its fields.
        what: the group's name, for messages.
        trusted: prefixes that `_target_` may begin with.
        role: methods that a class of this project must have to be made: it has classes for other purposes too.

    Raises:
        ConfigError: an untrusted or missing target, one of another kind, an unknown key, a wrong type or value.
    """
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{what} must name its class in {what}._target_: choose one with {what}=CHOICE")
    target, arguments = node["_target_"], {key: node[key] for key in node if key != "_target_"}
    _require_trusted(target, target, what, trusted)
    made = _import(target, what, trusted)
    if not isinstance(made, type):
        raise ConfigError(f"{what}._target_={target} is a {type(made).__name__}: name a class")
    # A trusted module also holds the names it imports; those are not its own.
    _require_trusted(f"{made.__module__}.{made.__qualname__}", target, what, trusted)
    if target.startswith(TRUSTED) and any(not callable(getattr(made, method, None)) for method in role):
        raise ConfigError(f"{what}._target_={target} is no class for {what}: choose one with {what}=CHOICE")
    if dataclasses.is_dataclass(made):
        parts = {one.name: one.metadata["made"] for one in dataclasses.fields(made) if "made" in one.metadata}
        nodes = {name: arguments.pop(name, None) for name in parts}
        built = {name: _part(nodes[name], f"{what}.{name}", what, trusted, parts[name]) for name in parts}
        return checked(made, arguments, what, built)
    return _called(made, arguments, what)


def _part(node: Any, what: str, whole: str, trusted: Sequence[str], role: Sequence[str]) -> Any:
    """A part that is made as the whole is, its messages with the part's name."""
    try:
        return build(node, what, trusted, role)
    except ConfigError as error:
        said = str(error)
        named = said.startswith(f"{whole}.") and not said.startswith(what)
        raise ConfigError(f"{what}{said.removeprefix(whole)}" if named else said) from error


def _require_trusted(name: str, target: str, what: str, trusted: Sequence[str]) -> None:
    if not name.startswith(tuple(trusted)):
        raise ConfigError(
            f"{what}._target_={target} is {'' if name == target else f'{name}, '}outside {', '.join(trusted)}: "
            f"if you trust that code, add 'trusted_targets=[{name.split('.')[0]}.]' to the command line"
        )


def _import(target: str, what: str, trusted: Sequence[str]) -> Any:
    ours = f"sniffer.{target}" if target.startswith(PARTS) else target
    module, _, name = ours.rpartition(".")
    try:
        # A user's project may have a package `models` as well: what it has and we have not is theirs, if they say so.
        if ours != target and not _has(module, name) and target.startswith(tuple(trusted[len(TRUSTED) :])):
            module = target.rpartition(".")[0]
        return getattr(importlib.import_module(module), name)
    except SnifferError:
        raise
    except Exception as error:  # of a user's module: any
        # A folder of the same name where the user stands would hide ours: say which one was found.
        found = getattr(sys.modules.get(target.split(".")[0]), "__file__", None)
        where = f" (looked in {found})" if found else ""
        raise ConfigError(f"{what}._target_={target} cannot be imported: {first_line(error)}{where}") from error


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


def checked(made: Any, arguments: dict[str, Any], what: str, parts: Mapping[str, Any] | None = None) -> Any:
    """Builds a dataclass, keys and types checked; one that OmegaConf cannot describe is simply called.

    Args:
        parts: fields that are objects already.
    """
    try:
        schema = OmegaConf.structured(made)
    except OmegaConfBaseException:
        return _called(made, {**arguments, **(parts or {})}, what)
    try:
        _unlock(schema)
        merged: Any = OmegaConf.merge(schema, arguments)
        if not parts:
            return OmegaConf.to_object(merged)
        keys = [str(key) for key in merged if key not in parts]
        values = {
            key: OmegaConf.to_object(merged[key]) if OmegaConf.is_config(merged[key]) else merged[key] for key in keys
        }
        return made(**values, **parts)
    except OmegaConfBaseException as error:
        raise config_error(error, what, made) from error
    except SnifferError:
        raise
    except Exception as error:  # of a user's class: any
        raise _unbuilt(error, what) from error


def _called(made: Any, arguments: dict[str, Any], what: str) -> Any:
    try:
        return made(**arguments)
    except SnifferError:
        raise
    except Exception as error:  # of a user's class: any
        raise _unbuilt(error, what) from error


def _unbuilt(error: Exception, what: str) -> ConfigError:
    kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
    return ConfigError(f"{what} cannot be built: {kind}{first_line(error)}")


def _unlock(node: DictConfig) -> None:
    """Frozen dataclasses make read-only nodes, nested ones too; here they are still being filled in."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if isinstance(child := node._get_node(key), DictConfig):
            _unlock(child)


def config_error(error: OmegaConfBaseException, what: str, root: Any) -> ConfigError:
    """One line with the full key; OmegaConf's own message for the rest."""
    parts = [part for part in (what, error.full_key or "") if part]
    key, reason = ".".join(parts), first_line(error)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{key} has no value: add {key}=... to the command line")
    if isinstance(error, ConfigKeyError):
        return ConfigError(f"{key} is not a key{_suggestion(error, root)}")
    reason = re.sub(r"Cannot convert 'ListConfig' to string: '(.*)'", r"wanted one value, not the list \1", reason)
    return ConfigError(f"{key or 'the configuration'}: {reason}")


def _suggestion(error: OmegaConfBaseException, root: Any) -> str:
    owner = error.object_type if dataclasses.is_dataclass(error.object_type) else root
    known = [f.name for f in dataclasses.fields(owner)]
    close = get_close_matches(str(error.key), known, n=1)
    return f": did you mean {close[0]}?" if close else f": choose from {', '.join(known)}"
