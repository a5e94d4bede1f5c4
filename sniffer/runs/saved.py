"""The saved configuration of a run folder, built again, and the conditions to run it under.

A run folder may come from anywhere. Its config.yaml is therefore read as plain YAML and never composed by
Hydra: it has no interpolations and can name only our own targets, or those that the command line trusts.
Its rerun.yaml is composed, by whoever asks for that; so it is read first, and may say no more than config.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sniffer.config import RERUN_DEFAULTS, RESTORE, Config, resolve, saved_config
from sniffer.errors import RunError


@dataclass(frozen=True)
class Trust:
    """What the command line allows a saved configuration to do: name these packages, run a checkpoint's code."""

    prefixes: Sequence[str] = ()
    remote_code: bool = False


def build(plain: Mapping[str, Any], trust: Trust, origin: Path) -> Config:
    """Builds what a saved configuration describes.

    Raises:
        RunError: it has an interpolation, or wants to run code that was not allowed.
        ConfigError: a key or value is not one of ours.
    """
    _refuse_code(plain, trust, origin, "--trust-remote-code")
    cfg = OmegaConf.create({**plain, "trusted_targets": list(trust.prefixes)})
    return resolve(cfg, ["trusted_targets=" + ",".join(trust.prefixes)])


def needed_config(folder: Path) -> dict[str, Any]:
    """What config.yaml of a run folder says.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    plain = saved_config(folder)
    if not plain:
        raise RunError(f"{folder} has no config.yaml: {RESTORE}")
    return plain


def check_rerun(folder: Path, overrides: Sequence[str]) -> None:
    """Reads a rerun.yaml before Hydra composes it: Hydra would do whatever its own settings there say.

    Args:
        overrides: of the command line, which alone can let a checkpoint run code of its own.

    Raises:
        RunError: it cannot be read, or says what a saved configuration never does.
    """
    origin = folder / "rerun.yaml"
    try:
        text = origin.read_text(encoding="utf-8")
        plain = yaml.safe_load(text)
    except FileNotFoundError:
        return  # Hydra says so
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"could not read {origin}: {' '.join(str(error).split())}; {RESTORE}") from error
    # A comment can be a setting of Hydra's as well: "# @package hydra".
    known = isinstance(plain, dict) and plain.pop("defaults", None) == list(RERUN_DEFAULTS) and "@package" not in text
    unknown = sorted(map(str, plain.keys() - Config.__dataclass_fields__.keys())) if known else ["defaults"]
    if unknown:
        raise RunError(f"{origin} has {', '.join(unknown)} that no run of ours saves: {RESTORE}")
    # Hydra would take them for ours, and do as their own defaults say.
    for stand_in in (folder / f"{name}.yaml" for name in RERUN_DEFAULTS):
        if stand_in.exists():
            raise RunError(f"{stand_in} is no file of a run, and would take the place of one of ours: remove it")
    allowed = any(re.match(r"\+{0,2}model\.trust_remote_code=", override) for override in overrides)
    _refuse_code(plain, Trust(remote_code=allowed), origin, "model.trust_remote_code=true")


def _refuse_code(plain: Mapping[str, Any], trust: Trust, origin: Path, to_trust: str) -> None:
    """Refuses interpolations, and code of the checkpoint that was not allowed; targets are checked when built."""
    for key, value in _leaves(plain):
        if isinstance(value, str) and "${" in value:
            raise RunError(f"{origin}: {key}={value} is an interpolation, which a saved configuration never has")
    if _model(plain).get("trust_remote_code") and not trust.remote_code:
        raise RunError(
            f"{origin} lets the checkpoint run code of its own (model.trust_remote_code=true): "
            f"add {to_trust} if you trust it"
        )


@contextmanager
def same_threads(threads: int | None) -> Iterator[None]:
    """Float sums depend on the number of threads: uses the recorded one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _model(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    model = plain.get("model")
    return model if isinstance(model, Mapping) else {}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{number}]")
    else:
        yield name, value
