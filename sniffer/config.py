"""The configuration: what Hydra composes, checked once and turned into real objects.

The root is a typed dataclass, so that Hydra itself refuses an unknown key or a wrong type. The groups
model, dataset and sampler are constructor calls written down; `resolve` builds them (build.py), and past
it there is no DictConfig.

Torch and transformers are not imported here: `--help` must answer at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sniffer.bounds import LAYERS
from sniffer.build import TRUSTED, build, checked, config_error
from sniffer.durable import durable_file
from sniffer.errors import ConfigError, RunError, first_line, reason
from sniffer.lock import is_held
from sniffer.ownership import RERUN_HEAD, refuse_taken
from sniffer.typed import typed_strings
from sniffer.types import COMPRESSIONS, KINDS
from sniffer.untrusted import CONFIG_BYTES, read_yaml


@dataclass
class HeadSampling:
    """Keeps `count` query heads in all (null: every one), drawn by `seed`."""

    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"capture.head_sampling.count={self.count} must be 1 or more, or null for all")


@dataclass
class CaptureConfig:
    """Which vectors to keep.

    `layers` and `heads` (query heads) are null for all, or numbers and ranges: 3, "0-7" (both ends
    included), "0:8" (the end left out), or a list of these. Here they become sorted tuples.
    """

    kinds: list[str] = field(default_factory=lambda: ["q", "k"])
    layers: Any = None
    heads: Any = None
    head_sampling: HeadSampling = field(default_factory=HeadSampling)
    full_attention_only: bool = False

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ConfigError(f"capture.kinds={self.kinds} must name some of {list(KINDS)}, each once")
        self.layers = numbers("capture.layers", self.layers)
        self.heads = numbers("capture.heads", self.heads)


@dataclass
class BatchConfig:
    """How documents share a forward pass; results do not depend on it.

    `max_tokens` is null for what suits the device (batching.py).
    """

    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(
                f"batch.max_tokens={self.max_tokens} must be 1 or more, or null for what suits the device"
            )


@dataclass
class OutputConfig:
    """How vectors are compressed, and when rows leave memory before the end of a run.

    `compression` is one of sniffer.types.COMPRESSIONS. `memory_limit` is in bytes, or text with a unit such as
    "8GiB"; here it becomes an integer. `checkpoint_every` counts documents.
    """

    compression: str = "auto"
    memory_limit: Any = None
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        if self.memory_limit is not None:
            self.memory_limit = n_bytes("output.memory_limit", self.memory_limit)
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ConfigError(f"output.checkpoint_every={self.checkpoint_every} must be 1 or more, or null for never")
        if self.compression not in COMPRESSIONS:
            raise ConfigError(f"output.compression={self.compression} is not one of {', '.join(COMPRESSIONS)}")


ENGINES = ("local", "ray")
OWN_CLUSTER = (None, "auto", "local")
"""Addresses of clusters that run, or are started, on this machine."""

MOST_WORKERS = 1 << 14


@dataclass
class EngineConfig:
    """What runs the model: this process (local), or workers on a Ray cluster, each with a model of its own.

    The other keys are for ray. `address` is null for a cluster of this machine alone, auto or host:port for one that
    runs. `workers` is null for one per GPU, or without GPUs one per node; `cpus_per_worker` and `gpus_per_worker` are
    null for an equal share of a node. `start_timeout`: seconds to wait for a first worker to have its model.
    """

    name: str = "local"
    address: str | None = None
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    start_timeout: float = 1800.0

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ConfigError(f"engine.name={self.name} is not one of {', '.join(ENGINES)}")
        for key, least in (("workers", 1), ("cpus_per_worker", 1), ("gpus_per_worker", 0)):
            value = getattr(self, key)
            if value is not None and not value >= least:
                raise ConfigError(f"engine.{key}={value} must be {least} or more, or null")
        if self.workers is not None and self.workers > MOST_WORKERS:
            raise ConfigError(f"engine.workers={self.workers} is more than the {MOST_WORKERS} that one run can have")
        if not self.start_timeout > 0:
            raise ConfigError(f"engine.start_timeout={self.start_timeout} must be more than 0 seconds")
        for key in ("address", "workers", "cpus_per_worker", "gpus_per_worker"):
            if self.name == "local" and getattr(self, key) is not None:
                raise ConfigError(f"engine.{key} is for engine=ray: engine=local runs the model in this process")
        if self.name == "ray" and find_spec("ray") is None:
            raise ConfigError("engine=ray needs Ray: pip install 'qk-sniffer[ray]'")


@dataclass
class Config:
    """The root. `resolve` puts built objects in the place of model, dataset and sampler.

    `plan`: true, or a mapping (plan.py), to be told what a run would need instead of running it.
    """

    seed: int = 0
    model: Any = MISSING
    dataset: Any = MISSING
    sampler: Any = MISSING
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    plan: Any = False
    trusted_targets: list[str] = field(default_factory=list)


def register() -> None:
    """Makes Hydra know the schema, and where a run's own record goes."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("record_folder", _record_folder, replace=True)


def conf_folder() -> Path:
    """The configuration files: inside the package when installed, beside it in the repository."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def holds_results(folder: Path) -> bool:
    """Whether a run has already written into this folder."""
    return (folder / "manifest.json").exists() or (folder / "captures").exists()


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


ROLES = {
    "sampler": ("bucket", "probability"),
    "dataset": ("check", "texts", "describe"),
    "model": ("check", "limits", "tokenizer", "load", "describe"),
}
"""What a run asks of the objects of each group (types.py)."""


def resolve(cfg: DictConfig, overrides: Sequence[str] = (), roles: Mapping[str, Sequence[str]] | None = None) -> Config:
    """Checks a composed configuration and builds what it describes.

    Args:
        cfg: what Hydra composed, without the hydra node.
        overrides: the words that were typed; only they can extend the trusted targets.
        roles: what the object of each group must be able to do, where it is one of ours; nothing by default.

    Raises:
        ConfigError: in one line, the key, the value found and the one wanted.
    """
    return build_config(cfg, typed_strings(overrides, "trusted_targets"), roles)


def build_config(
    cfg: DictConfig, trust: Sequence[str] = (), roles: Mapping[str, Sequence[str]] | None = None
) -> Config:
    """As `resolve`; `trust` are the prefixes that were typed, whether or not `cfg` asks for them."""
    plain = plain_values(cfg)
    trusted = _trusted_targets(plain.pop("trusted_targets"), trust)
    _require_countable_layers(plain["model"])
    config: Config = checked(Config, {**plain, **dict.fromkeys(_BUILT)}, "")
    for key in _BUILT:
        setattr(config, key, build(plain[key], key, trusted, (roles or {}).get(key, ())))
    return config


def _require_countable_layers(model: Any, name: str = "model") -> None:
    """Refuses more layers than a part's column can count, before a list of them is made."""
    for key, value in model.items() if isinstance(model, dict) else ():
        if isinstance(value, int) and "layer" in str(key) and value > LAYERS:
            raise ConfigError(f"{name}.{key}={value} is more than the {LAYERS:,} layers that a run can have")
        _require_countable_layers(value, f"{name}.{key}")


ONCE = ("trusted_targets", "plan")
"""Keys of one command line, which a run does not save."""

_BUILT = ("sampler", "dataset", "model")
"""Cheap ones first: importing a model's class brings torch along."""


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts and lists: interpolations resolved, local paths made absolute."""
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), cfg)
        plain = OmegaConf.to_container(typed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise config_error(error, "", Config) from error
    except OverflowError as error:  # of OmegaConf, which then does not name the key
        raise ConfigError(f"the configuration has a number that is too large: {first_line(error)}") from error
    assert isinstance(plain, dict)
    return _with_absolute_paths({str(key): value for key, value in plain.items()})


def save_config(folder: Path, cfg: DictConfig) -> None:
    """Writes config.yaml, the resolved configuration, and rerun.yaml, which composes to the same one."""
    plain = plain_values(cfg)
    # Trust is given on a command line, each time: a run folder may come from someone else.
    for key in ONCE:
        del plain[key]
    save_plain(folder, plain)


def save_plain(folder: Path, plain: Mapping[str, Any]) -> None:
    """As `save_config`, from plain values.

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
    # where there is one, the rerun.yaml tells that it is ours (ownership.py).
    for name, content in (("rerun.yaml", head + defaults + text), ("config.yaml", text)):
        with durable_file(folder / name) as file:
            file.write(content.encode())


RERUN_DEFAULTS = ("schema", "common", "_self_")
"""What a rerun.yaml is composed of."""


def saved_config(folder: Path) -> dict[str, Any]:
    """What config.yaml of a run folder says; nothing where there is none.

    Raises:
        RunError: the file is not YAML, or not a mapping.
    """
    path = folder / "config.yaml"
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

UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def n_bytes(key: str, value: Any) -> int:
    """A number of bytes, from an integer or from text such as "8GiB", "500MB" or "1e9".

    Raises:
        ConfigError: anything else, or nothing left.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = {name.lower(): factor for name, factor in UNITS.items()}.get((match[2] or "B").lower()) if match else None
    try:
        found = int(float(match[1]) * unit) if match and unit else 0
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ConfigError(f"{key}={value} is not a size: give bytes, or a number with one of {', '.join(UNITS)}")
    return found


def numbers(key: str, value: Any) -> tuple[int, ...] | None:
    """Numbers and ranges as a sorted tuple: 3, "0-7", "0:8", or a list of these; None stays None.

    Raises:
        ConfigError: anything else, a negative number, or nothing at all.
    """
    if value is None:
        return None
    items = value if isinstance(value, list | tuple) else [value]
    found = {number for item in items for number in _range(key, item)}
    if not found:
        raise ConfigError(f"{key}={value} names nothing: use null for all")
    return tuple(sorted(found))


MOST = 1 << 20
"""Beyond any model's layers and heads; a range is written out as numbers."""


def _range(key: str, item: Any) -> Sequence[int]:
    if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
        return (item,)
    if isinstance(item, str) and (match := re.fullmatch(r"(\d{1,99})(?:([-:])(\d{1,99}))?", item)):
        first, last = int(match[1]), int(match[3] or match[1]) + (match[2] != ":")
        if last > MOST:
            raise ConfigError(f"{key} has {item!r}, and no model has so many: name the last one")
        if last <= first:
            raise ConfigError(f"{key} has {item!r}, which names nothing: give the lower end first, as in 0-7 or 0:8")
        return range(first, last)
    raise ConfigError(f"{key} has {item!r:.60}, which is neither a number from 0 nor a range such as 0-7 or 0:8")


def _record_folder(output_dir: str, plan: Any = False) -> str | None:
    """Hydra's record of the job goes to .hydra, but nowhere if something else is there already, or for a plan."""
    folder = Path(output_dir)
    return None if plan or is_held(folder) or not is_free(folder) else ".hydra"


def _trusted_targets(wanted: list[str], typed: Sequence[str]) -> tuple[str, ...]:
    if not set(wanted) <= set(typed):
        raise ConfigError("trusted_targets is set in a file: it is honoured on the command line only")
    if not all(wanted):
        raise ConfigError("trusted_targets has an empty prefix, which would trust everything: name the package")
    return (*TRUSTED, *wanted)


def _with_absolute_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """A run must be repeatable from anywhere, so local paths are stored as absolute ones."""
    for group, key in (("dataset", "path"), ("dataset", "name"), ("model", "checkpoint")):
        node = plain[group]
        # A folder such as 2024 is read as a number.
        if isinstance(node, dict) and type(node.get(key)) is int:
            node[key] = str(node[key])
        if isinstance(node, dict) and isinstance(node.get(key), str):
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
