"""What a run folder keeps of its configuration, and whether the folder may be written into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sniffer.config.build import config_error
from sniffer.config.schema import Keys
from sniffer.errors import ConfigError, RunError, first_line, reason
from sniffer.forward.generation.request import CACHING
from sniffer.forward.selection import listed
from sniffer.storage.durable import durable_file
from sniffer.storage.layout import RunFolder
from sniffer.storage.ownership import RERUN_HEAD, refuse_taken
from sniffer.storage.untrusted import CONFIG_BYTES, read_yaml
from sniffer.types import is_url


def save_plain(folder: Path, plain: Mapping[str, Any]) -> None:
    """Writes config.yaml, a resolved configuration, and rerun.yaml, which composes to the same one.

    Args:
        plain: without what one command line says (ONCE).

    Raises:
        CaptureError: the disk is full or cannot be written to.
        ConfigError: it is too long to be read again.
    """
    length = len(json.dumps(plain, default=str))
    if length > CONFIG_BYTES // 4:
        raise ConfigError(
            f"the configuration has {length:,} characters, more than the {CONFIG_BYTES // 4:,} that can be saved: "
            "shorten its lists, such as capture.heads, by ranges"
        )
    text = OmegaConf.to_yaml(OmegaConf.create(dict(plain)))
    head = f"{RERUN_HEAD} [key=value ...]\n"
    defaults = "".join(["defaults:\n", *(f"  - {name}\n" for name in RERUN_DEFAULTS)])
    # Half a config.yaml may be a whole configuration, and another one. It comes last: a run that has it has both, and
    # where there is one, the rerun.yaml tells that it is ours (storage/ownership.py).
    for name, content in ((RunFolder.RERUN, head + defaults + text), (RunFolder.CONFIG, text)):
        with durable_file(folder / name) as file:
            file.write(content.encode())


RERUN_DEFAULTS = ("schema", "common", "_self_")
"""What a rerun.yaml is composed of."""


def saved_config(folder: Path) -> dict[str, Any]:
    """What config.yaml of a run folder says; nothing where there is none.

    Raises:
        RunError: the file is not YAML, or not a mapping.
    """
    path = folder / RunFolder.CONFIG
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"could not read {path}: {first_line(error)}; {RESTORE}") from error
    if not isinstance(values, dict):
        raise RunError(f"{path} is not a mapping of keys to values: {RESTORE}")
    return values


RESTORE = "restore the file, or let `python -m sniffer.runs resume RUN --restore` write it again"


def as_chosen(asked: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, with what a run has chosen itself where nothing was said."""
    batch, chosen = dict(asked.get("batch") or {}), saved.get("batch") or {}
    for key in ("max_tokens", "breaks"):
        if batch.get(key) is None and key in batch:
            batch[key] = chosen.get(key)
    return {**asked, **({"batch": batch} if batch else {})}


ONCE = ("trusted_targets", "plan")
"""Keys of one command line, which a run does not save: it may come from someone else, and trust is given by typing."""


def holds_results(folder: Path) -> bool:
    """Whether a run has already written into this folder."""
    return (folder / RunFolder.MANIFEST).exists() or (folder / RunFolder.CAPTURES).exists()


def refuse_results(folder: Path) -> None:
    """Raises RunError where an earlier run's results, or anyone's files, would be overwritten."""
    if holds_results(folder):
        raise RunError(f"{folder} already holds results: choose another hydra.run.dir, or remove it first")
    refuse_taken(folder)


def is_free(folder: Path) -> bool:
    """Whether a run can begin in this folder."""
    try:
        refuse_results(folder)
    except RunError:
        return False
    return True


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts and lists: interpolations resolved, local paths made absolute."""
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Keys), cfg)
        plain = OmegaConf.to_container(typed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise config_error(error, "", Keys) from error
    except OverflowError as error:  # of OmegaConf, which then does not name the key
        raise ConfigError(f"the configuration has a number that is too large: {first_line(error)}") from error
    assert isinstance(plain, dict)
    plain["capture"]["kinds"] = listed(plain["capture"]["kinds"])
    # As early releases saved it.
    if not plain["generate"]:
        del plain["generate"]
    elif isinstance(plain["generate"], dict):
        asked = plain["generate"].items()
        plain["generate"] = {key: value for key, value in asked if value is not None or key not in CACHING}
    return _with_absolute_paths(_with_text_keys(plain))


def _with_text_keys(node: Any) -> Any:
    """As JSON has them, which the manifest is in: of `capture.heads` by layer, say."""
    if isinstance(node, dict):
        return {str(key): _with_text_keys(value) for key, value in node.items()}
    return [_with_text_keys(one) for one in node] if isinstance(node, list) else node


def _with_absolute_template(node: Any, key: str) -> None:
    """A chat template may be a file too; a name or the text of one is left as it is."""
    named = node.get(key) if isinstance(node, dict) else None
    if isinstance(named, str) and "{" not in named and Path(named).suffix:
        node[key] = str(Path(named).expanduser().absolute())


PLACES = (("model", "tokenizer"), ("model", "adapter"))
"""Keys of folders or hub ids beside the checkpoint's."""


def _with_absolute_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """A run must be repeatable from anywhere, so local paths are stored as absolute ones."""
    dataset, hay = plain["dataset"], None
    if isinstance(dataset, dict):
        # Of niah the template itself, of others a key among several.
        _with_absolute_template(dataset, "chat")
        _with_absolute_template(dataset.get("chat"), "template")
        hay = dataset.get("hay")
    nodes = {"dataset": dataset, "dataset.hay": hay, "model": plain["model"]}
    texts = [(group, key) for group in ("dataset", "dataset.hay") for key in ("path", "name")]
    for group, key in (*texts, ("model", "checkpoint"), *PLACES):
        node = nodes[group]
        # A folder such as 2024 is read as a number.
        if isinstance(node, dict) and type(node.get(key)) is int:
            node[key] = str(node[key])
        if isinstance(node, dict) and isinstance(node.get(key), str) and not (key == "path" and is_url(node[key])):
            # Such as from a shell variable that is not set; it would mean the folder one stands in.
            if not node[key].strip():
                raise ConfigError(f"{group}.{key} is empty: give a path{'' if key == 'path' else ' or a hub id'}")
            try:
                local = Path(node[key]).expanduser()
                # A path is always one; a name may be a hub id too.
                if key == "path" or local.is_dir() or node[key].startswith(("./", "../", "~")):
                    node[key] = str(local.absolute())
            except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no such user
                why = reason(error) if isinstance(error, OSError) else first_line(error)
                raise ConfigError(f"{group}.{key}={node[key]:.80} cannot be a path: {why}") from error
    return plain
