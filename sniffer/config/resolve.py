"""From what Hydra composed to the Config of a run: checked once, and past this there is no DictConfig.

The root is a typed dataclass (schema.py), so that Hydra itself refuses an unknown key or a wrong type. The groups
model, dataset and sampler are constructor calls written down, which build.py makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from sniffer.config.build import TRUSTED, build, checked
from sniffer.config.saving import ONCE, is_free, plain_values
from sniffer.config.schema import Config, Keys, PlanConfig
from sniffer.config.typed import typed_strings
from sniffer.errors import ConfigError
from sniffer.forward.generation.request import GenerateConfig
from sniffer.limits import LAYERS
from sniffer.storage.layout import RunFolder
from sniffer.storage.lock import is_held


def register() -> None:
    """Makes Hydra know the schema, and where a run's own record goes."""
    ConfigStore.instance().store(name="schema", node=Keys)
    OmegaConf.register_new_resolver("record_folder", _record_folder, replace=True)


def conf_folder() -> Path:
    """The configuration files: inside the package when installed, beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


ROLES = {
    "sampler": ("bucket", "probability"),
    "dataset": ("check", "texts", "describe"),
    "model": ("check", "limits", "load_tokenizer", "load", "describe"),
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
    return build_config(plain_values(cfg), typed_strings(overrides, "trusted_targets"), roles)


def build_config(
    plain: Mapping[str, Any], trust: Sequence[str] = (), roles: Mapping[str, Sequence[str]] | None = None
) -> Config:
    """As `resolve`, from all keys as plain values; `trust` are the prefixes that were typed, whether `plain` asks for
    them or not."""
    wanted = plain["trusted_targets"]
    trusted = _trusted_targets(wanted, trust)
    _require_countable_layers(plain["model"])
    groups = dict.fromkeys(("sampler", "dataset", "model"))
    keys: Keys = checked(Keys, {**plain, **groups, "trusted_targets": []}, "")

    def made(group: str) -> Any:
        return build(plain[group], group, trusted, (roles or {}).get(group, ()))

    # Cheap ones first: importing a model's class may bring torch along.
    sampler, dataset, model = map(made, groups)
    return Config(
        seed=keys.seed,
        model=model,
        dataset=dataset,
        sampler=sampler,
        capture=keys.capture,
        batch=keys.batch,
        output=keys.output,
        engine=keys.engine,
        generate=generation_asked(plain.get("generate")),
        plan=plan_asked(plain["plan"]) if plain["plan"] else None,
        trusted_targets=tuple(wanted),
        saved={key: value for key, value in plain.items() if key not in ONCE},
    )


def generation_asked(value: Any) -> GenerateConfig | None:
    """The group `generate`: nothing, or a mapping; raises ConfigError as `plan_asked`."""
    if not value:
        return None
    if not isinstance(value, dict) or "method" not in value:
        raise ConfigError(f"generate={value} says not how: choose generate=greedy or generate=sample, or none")
    asked: GenerateConfig = checked(GenerateConfig, value, "generate")
    return asked


def plan_asked(value: Any) -> PlanConfig:
    """The key `plan` as given: true, or a mapping.

    Raises:
        ConfigError: neither, an unknown key, or a wrong value.
    """
    if value is True:
        return PlanConfig()
    if not isinstance(value, dict):
        raise ConfigError(f"plan={value} must be true, or a mapping such as '{{tokens_per_second: 900}}'")
    asked: PlanConfig = checked(PlanConfig, value, "plan")
    return asked


def _require_countable_layers(model: Any, name: str = "model") -> None:
    """Refuses more layers than a part's column can count, before a list of them is made."""
    for key, value in model.items() if isinstance(model, dict) else ():
        counts = "layer" in str(key) and "per_layer" not in str(key)  # vocab_size_per_layer_input counts tokens
        if isinstance(value, int) and counts and value > LAYERS:
            raise ConfigError(f"{name}.{key}={value} is more than the {LAYERS:,} layers that a run can have")
        _require_countable_layers(value, f"{name}.{key}")


def _record_folder(output_dir: str, plan: Any = False) -> str | None:
    """Hydra's record of the job goes to .hydra, but nowhere if something else is there already, or for a plan."""
    folder = Path(output_dir)
    return None if plan or is_held(folder) or not is_free(folder) else RunFolder.HYDRA


def _trusted_targets(wanted: list[str], typed: Sequence[str]) -> tuple[str, ...]:
    if not set(wanted) <= set(typed):
        raise ConfigError("trusted_targets is set in a file: it is honoured on the command line only")
    if not all(wanted):
        raise ConfigError("trusted_targets has an empty prefix, which would trust everything: name the package")
    return (*TRUSTED, *wanted)
