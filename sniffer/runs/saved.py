"""The saved configuration of a run folder, built again, and the conditions to run it under.

A run folder may come from anywhere. Its config.yaml is therefore read as plain YAML and never composed by
Hydra: it has no interpolations and can name only our own targets, or those that the command line trusts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sniffer.config import Config, resolve
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
    for key, value in _leaves(plain):
        if isinstance(value, str) and "${" in value:
            raise RunError(f"{origin}: {key}={value} is an interpolation, which a saved configuration never has")
    if _model(plain).get("trust_remote_code") and not trust.remote_code:
        raise RunError(
            f"{origin} lets the checkpoint run code of its own (model.trust_remote_code=true): "
            "add --trust-remote-code if you trust it"
        )
    cfg = OmegaConf.create({**plain, "trusted_targets": list(trust.prefixes)})
    return resolve(cfg, ["trusted_targets=" + ",".join(trust.prefixes)])


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
