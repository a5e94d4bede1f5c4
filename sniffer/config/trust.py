"""The saved configuration of a run folder, built again, and the conditions to run it under.

A run folder may come from anywhere. Its config.yaml is therefore read as plain YAML and never composed by
Hydra: it has no interpolations and can name only our own targets, or those that the command line trusts.
Its rerun.yaml is composed, by whoever asks for that; so it is read first, and may say no more than config.yaml
(rerun.py has the rest of it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from sniffer.config.resolve import ROLES, build_config
from sniffer.config.saving import ONCE, RERUN_DEFAULTS, RESTORE, plain_values, saved_config
from sniffer.config.schema import OWN_CLUSTER, Config, Keys
from sniffer.config.typed import is_typed
from sniffer.errors import RunError, unbroken
from sniffer.storage.layout import RunFolder
from sniffer.storage.untrusted import plain_yaml, read_text

NO_MIRROR = "none"


@dataclass(frozen=True)
class Trust:
    """What the command line allows a saved configuration to do.

    Attributes:
        prefixes: packages that it may name classes of.
        remote_code: whether a checkpoint may run code of its own.
        address: of the Ray cluster to join, in the place of the one that is saved; None keeps one of this machine.
        mirror: the URL to mirror the run to, in the place of the one that is saved, or NO_MIRROR; None keeps none.
    """

    prefixes: Sequence[str] = ()
    remote_code: bool = False
    address: str | None = None
    mirror: str | None = None

    @property
    def url(self) -> str | None:
        """The URL that was typed, if any was."""
        return None if self.mirror == NO_MIRROR else self.mirror


def build(plain: Mapping[str, Any], trust: Trust, origin: Path) -> Config:
    """Builds what a saved configuration describes.

    Raises:
        RunError: it has an interpolation, or wants to run code, to call a machine or to write to a URL that was not
            allowed.
        ConfigError: a key or value is not one of ours.
    """
    cfg = OmegaConf.create({**allowed(plain, trust, origin), "trusted_targets": list(trust.prefixes)})
    return build_config(plain_values(cfg), trust.prefixes, ROLES)


def allowed(plain: Mapping[str, Any], trust: Trust, origin: Path) -> dict[str, Any]:
    """A saved configuration as it may be run: with the address and the mirror that were typed, if any were.

    Raises:
        RunError: as `build`.
    """
    _refuse_code(plain, trust, origin, "--trust-remote-code")
    found = dict(plain)
    if trust.mirror is None:
        _refuse_mirror(plain, origin, "--mirror {}", f"--mirror {NO_MIRROR}")
    elif "output" in plain:
        found["output"] = {**_node(plain, "output"), **_mirrored(plain, trust.mirror)}
    if trust.address is None:
        _refuse_address(plain, origin, "--engine-address {}")
        return found
    return {**found, "engine": {**_node(plain, "engine"), "address": trust.address}}


def _mirrored(plain: Mapping[str, Any], url: str) -> dict[str, Any]:
    """What `output` has otherwise; without a copy, rows stay where they are."""
    if url != NO_MIRROR:
        return {"mirror": url}
    return {"mirror": None, **({"keep_local": True} if "keep_local" in _node(plain, "output") else {})}


def needed_config(folder: Path) -> dict[str, Any]:
    """What config.yaml of a run folder says.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    plain = saved_config(folder)
    if not plain:
        raise RunError(f"{folder} has no config.yaml: {RESTORE}")
    return plain


def read_rerun(folder: Path, words: Sequence[str]) -> DictConfig:
    """What a rerun.yaml says, for Hydra to compose: Hydra would do whatever its own settings there say.

    Args:
        words: those that were typed, which alone can let a checkpoint run code of its own.

    Raises:
        RunError: it cannot be read, or says what a saved configuration never does.
    """
    origin = folder / RunFolder.RERUN
    try:
        text = read_text(origin)
        plain = plain_yaml(text)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            f"{folder} has no rerun.yaml: give the folder that a run printed, not one of an import"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"could not read {origin}: {unbroken(error)}; {RESTORE}") from error
    # A comment can be a setting of Hydra's as well: "# @package hydra".
    known = isinstance(plain, dict) and plain.pop("defaults", None) == list(RERUN_DEFAULTS) and "@package" not in text
    unknown = sorted(map(str, plain.keys() - SAVED)) if known else ["defaults"]
    if unknown:
        raise RunError(f"{origin} has {', '.join(unknown)} that no run of ours saves: {RESTORE}")
    # Hydra would take them for ours, if the folder were where it looks: whoever put them there meant it to.
    for stand_in in (folder / f"{name}.yaml" for name in RERUN_DEFAULTS):
        if stand_in.exists():
            raise RunError(f"{stand_in} is no file of a run, and has the name of one of ours: remove it")
    _refuse_code(plain, Trust(remote_code=is_typed(words, REMOTE_CODE)), origin, f"{REMOTE_CODE}=true")
    if not is_typed(words, "engine.address"):
        _refuse_address(plain, origin, "engine.address={}")
    if not is_typed(words, "output.mirror"):
        _refuse_mirror(plain, origin, "output.mirror=URL for another place than {}", "output.mirror=null")
    # Hydra's own reading of numbers, as before.
    cfg = OmegaConf.create(text)
    assert isinstance(cfg, DictConfig)
    return cfg


SAVED = Keys.__dataclass_fields__.keys() - set(ONCE)
REMOTE_CODE = "model.trust_remote_code"


def _refuse_code(plain: Mapping[str, Any], trust: Trust, origin: Path, to_trust: str) -> None:
    """Refuses interpolations, and code of the checkpoint that was not allowed; targets are checked when built."""
    for key, value in _leaves(plain):
        if isinstance(value, str) and "${" in value:
            raise RunError(f"{origin}: {key}={value} is an interpolation, which a saved configuration never has")
    if _node(plain, "model").get("trust_remote_code") and not trust.remote_code:
        raise RunError(
            f"{origin} lets the checkpoint run code of its own (model.trust_remote_code=true): "
            f"add {to_trust} if you trust it"
        )


def _refuse_address(plain: Mapping[str, Any], origin: Path, to_trust: str) -> None:
    """Refuses a cluster elsewhere: whoever joins one does as it says."""
    address = _node(plain, "engine").get("address")
    if address not in OWN_CLUSTER:
        raise RunError(
            f"{origin} would join the Ray cluster at {address} (engine.address): add {to_trust.format(address)} "
            "if you trust it, or give another address"
        )


def _refuse_mirror(plain: Mapping[str, Any], origin: Path, to_trust: str, without: str) -> None:
    """Refuses to send what is captured elsewhere: someone else may have named the place, and the text as well."""
    if (url := _node(plain, "output").get("mirror")) is not None:
        raise RunError(
            f"{origin} would copy the run to {url} (output.mirror): "
            f"add {to_trust.format(quote(str(url)))} if you trust it, or {without} to go on without"
        )


def _node(plain: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    node = plain.get(key)
    return node if isinstance(node, Mapping) else {}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{number}]")
    else:
        yield name, value
