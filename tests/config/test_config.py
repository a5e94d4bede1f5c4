"""The configuration composes, is checked in one line, and is written so that it composes again."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sniffer.config import schema as module
from sniffer.config.build import TRUSTED, build
from sniffer.config.resolve import conf_folder, register, resolve
from sniffer.config.saving import ONCE, holds_results, plain_values, refuse_results
from sniffer.config.schema import Config, Keys, OutputConfig
from sniffer.errors import CaptureError, ConfigError, RunError, SnifferError
from sniffer.forward.numbers import numbers
from sniffer.sampler import LogUniform, Sampler
from sniffer.words import one_line
from tests.helpers_config import save_config
from tests.helpers_disk import Disk, failing

GROUPS = ("model", "dataset", "sampler", "engine", "experiment")
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((conf_folder() / group).glob("*.yaml"))]


@dataclass(frozen=True)
class Opened:
    """A user's own dataclass, as a trusted target."""

    size: int
    name: str = "x"


@dataclass(frozen=True)
class Failing:
    """A user's own dataclass, with a mistake in it."""

    size: int = 0

    def __post_init__(self) -> None:
        print({}[1 // self.size])


class Plain:
    """A user's own class that is no dataclass."""

    def __init__(self, size: int) -> None:
        self.size = size


@pytest.fixture(autouse=True)
def schema() -> Iterator[None]:
    register()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str, folder: Path | None = None, name: str = "config") -> DictConfig:
    extra = [f"hydra.searchpath=[file://{conf_folder()}]"] if folder else []
    with initialize_config_dir(str(folder or conf_folder()), version_base="1.3"):
        return compose(name, [*overrides, *extra])


def refused(*overrides: str) -> str:
    """The one line that refuses this configuration, with a model that costs no import."""
    cfg = composed(*overrides)
    cfg.model = {"_target_": "sniffer.config.schema.EngineConfig"}
    with pytest.raises(ConfigError) as caught:
        resolve(cfg, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group: str, choice: str) -> None:
    cfg = composed(f"{group}={choice}")
    assert set(cfg) == {f.name for f in fields(Keys)}
    if group == "model" and choice != "checkpoint":
        assert resolve(cfg).model.checkpoint


@pytest.mark.long
@pytest.mark.parametrize(("group", "choice"), [c for c in CHOICES if c[0] in ("model", "dataset", "sampler")])
def test_every_choice_writes_down_all_fields_of_its_class(group: str, choice: str) -> None:
    node = composed(f"{group}={choice}")[group]
    written = yaml.safe_load((conf_folder() / group / f"{choice}.yaml").read_text())
    # What stands on another choice differs from it in what it says.
    chosen = {*_CHOSEN.get(group, ()), *(written if "defaults" in written else ())}
    path, name = node._target_.rsplit(".", 1)
    made = getattr(importlib.import_module(path), name)
    assert set(node) - {"_target_"} == {f.name for f in fields(made)}
    for f in fields(made):
        if not OmegaConf.is_missing(node, f.name) and f.name not in chosen:
            default = OmegaConf.structured(made)[f.name]
            assert node[f.name] == default, f"{group}={choice}: {f.name}"


_CHOSEN = {"model": ("checkpoint", "model_type", "architecture"), "sampler": ("q", "k"), "dataset": ("hay",)}
"""The keys in which choices of a group differ from their class's defaults on purpose."""


def test_the_root_file_agrees_with_the_schema() -> None:
    written = yaml.safe_load((conf_folder() / "config.yaml").read_text())
    defaults = OmegaConf.to_container(OmegaConf.structured(Keys))
    assert isinstance(defaults, dict)
    for key in set(written) - {"defaults"}:
        assert written[key] == defaults[key], key


def test_resolve_gives_real_objects() -> None:
    cfg = composed("sampler.base_rate=2", "dataset=pydoc", "dataset.shard.count=3", "capture.layers=0-2")
    cfg.model = {"_target_": "sniffer.config.schema.EngineConfig"}
    config = resolve(cfg)
    assert config.sampler == LogUniform(base_rate=2.0)
    assert config.dataset.shard.count == 3
    assert config.capture.layers == (0, 1, 2)
    assert isinstance(config.capture, module.CaptureConfig)


def test_what_a_run_gets_is_fixed_and_has_a_type() -> None:
    types = get_type_hints(Config, vars(module) | {"Sampler": Sampler})
    assert {f.name for f in fields(Config)} == {f.name for f in fields(Keys)} | {"saved"}
    assert Any not in types.values()
    cfg = composed("dataset=pydoc", "plan={read: false}", "seed=3")
    cfg.model = {"_target_": "sniffer.config.schema.EngineConfig"}
    config = resolve(cfg)
    assert config.plan == module.PlanConfig(read=False)
    assert config.saved == {key: value for key, value in plain_values(cfg).items() if key not in ONCE}
    for f in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, f.name, None)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("sampler.base_rate=abc", ["sampler.base_rate", "'abc'", "Float"]),
        ("sampler.base_rate=-1", ["sampler.base_rate=-1"]),
        ("sampler.base_rate=nan", ["sampler.base_rate=nan"]),
        ("sampler.min_bucket_size=100", ["sampler.min_bucket_size=100", "64", "128"]),
        ("+sampler.bse_rate=1", ["sampler.bse_rate", "base_rate"]),
        ("+dataset.shard.indx=1", ["dataset.shard.indx", "index"]),
        ("dataset.shard.index=x", ["dataset.shard.index", "Integer"]),
        ("dataset.shard.index=1", ["dataset.shard.index=1", "dataset.shard.count=1"]),
        ("dataset.max_examples=0", ["dataset.max_examples=0"]),
        ("dataset=text", ["dataset.path", "no value"]),
        ("capture.kinds=[q,z]", ["capture.kinds", "z", "q_pre"]),
        ("capture.kinds=[]", ["capture.kinds"]),
        ("capture.kinds=[q,q]", ["capture.kinds"]),
        ("capture.layers=three", ["capture.layers", "three"]),
        ("capture.head_sampling.count=0", ["capture.head_sampling.count=0"]),
        ("batch.max_tokens=0", ["batch.max_tokens=0", "null"]),
        ("output.memory_limit=3GX", ["output.memory_limit=3GX", "GiB"]),
        ("output.memory_limit=0", ["output.memory_limit=0", "bytes"]),
        ("output.memory_limit=8", ["output.memory_limit=8 would be 8 bytes: did you mean 8GiB? (for bytes, 8B)"]),
        ("output.memory_limit=much", ["output.memory_limit=much", "bytes"]),
        ("output.checkpoint_every=0", ["output.checkpoint_every=0", "null"]),
        ("output.compression=gzip", ["output.compression=gzip", "auto, zstd, none"]),
        ("engine.name=spark", ["engine.name=spark", "local, ray"]),
        ("engine.workers=2", ["engine.workers", "engine=ray"]),
        ("engine={name: ray, workers: 0}", ["engine.workers=0", "1 or more"]),
        ("engine={name: ray, gpus_per_worker: -1}", ["engine.gpus_per_worker=-1"]),
        ("engine={name: ray, start_timeout: nan}", ["engine.start_timeout=nan"]),
        ("sampler._target_=os.system", ["sampler._target_=os.system", "trusted_targets"]),
        ("sampler._target_=models.embedded.TemporaryDirectory", ["tempfile.TemporaryDirectory", "outside"]),
        ("sampler._target_=sniffer.sampler.describe", ["sampler._target_", "name a class"]),
        ("sampler._target_=sniffer.sampler.Nope", ["sampler._target_", "Nope"]),
        ("sampler._target_=sniffer.nope.All", ["sampler._target_", "sniffer.nope"]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(override: str, names: list[str]) -> None:
    message = refused(override)
    assert all(name in message for name in names), message


def test_a_nested_target_is_data_not_a_call() -> None:
    node = {"_target_": "tests.config.test_config.Plain", "size": {"_target_": "os.system", "command": "true"}}
    assert build(node, "model", ("tests.",)).size == node["size"]


def test_a_users_own_classes_are_built_and_checked() -> None:
    trusted = (*TRUSTED, "tests.")
    assert build({"_target_": "tests.config.test_config.Opened", "size": 3}, "sampler", trusted) == Opened(3)
    assert build({"_target_": "tests.config.test_config.Plain", "size": 3}, "sampler", trusted).size == 3
    for target, arguments in (
        ("Failing", {}),
        ("Failing", {"size": 3}),
        ("Opened", {}),
        ("Opened", {"size": "x"}),
        ("Plain", {"sise": 3}),
    ):
        with pytest.raises(ConfigError, match="sampler"):
            build({"_target_": f"tests.config.test_config.{target}", **arguments}, "sampler", trusted)


def test_a_users_module_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for number, code in enumerate(("def f(:\n", "1 / 0\n", "import nothing_of_the_kind\n", "raise RuntimeError\n")):
        (tmp_path / f"theirs{number}.py").write_text(code)
        with pytest.raises(ConfigError, match=rf"sampler._target_=theirs{number}\.Mine cannot be imported"):
            build({"_target_": f"theirs{number}.Mine"}, "sampler", (*TRUSTED, "theirs"))


def test_trust_comes_from_the_command_line_only(tmp_path: Path) -> None:
    target = ["sampler._target_=tests.config.test_config.Plain", "trusted_targets=[tests.]"]
    cfg = composed(*target)
    cfg.model, cfg.dataset = {"_target_": "sniffer.config.schema.EngineConfig"}, {"_target_": "sniffer.dataset.Pydoc"}
    cfg.sampler = {"_target_": "tests.config.test_config.Plain", "size": 1}
    assert resolve(cfg, target).sampler.size == 1
    with pytest.raises(ConfigError, match="command line"):
        resolve(cfg, overrides=["seed=1"])
    save_config(tmp_path, cfg)
    assert "trusted_targets" not in yaml.safe_load((tmp_path / "rerun.yaml").read_text())


def test_engine_ray_needs_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install 'qk-sniffer[ray]'" in refused("engine=ray")


@pytest.mark.parametrize("prefix", ["['']", "[os.,'']"])
def test_an_empty_trusted_prefix_is_refused(prefix: str) -> None:
    assert "trusted_targets" in refused(f"trusted_targets={prefix}")


ODD: tuple[Any, ...] = (
    *(0, -1, 1.5, 2**63, -(10**400), float("inf"), float("nan"), True, None),
    *("", "null", "9" * 5000, "x" * 5000, "\ud800", "\0", "\n", "${x}", "/", "~nobody/x", "1-"),
    *([], [None], {}, {"a": 1}, {"_target_": "os.system"}),
)
"""Values that somebody's shell, script or file may come to set."""


def leaves(node: Any, name: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{name}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{name}{key}.")


@pytest.mark.long
def test_any_value_of_any_key_is_taken_or_refused_in_one_line() -> None:
    """A fifth of the values for each key, and the others for the next ones."""
    plain = OmegaConf.to_container(composed("model=llama3", "model.weights=random", "dataset=jsonl", "dataset.path=a"))
    for number, key in enumerate(leaves(plain)):
        for value in ODD[number % 5 :: 5]:
            cfg = OmegaConf.create(plain)
            try:
                OmegaConf.update(cfg, key, value, merge=False)
            except OmegaConfBaseException:
                continue  # as Hydra would refuse it
            try:
                assert isinstance(resolve(cfg), Config)
            except SnifferError as error:
                assert len(one_line(error).splitlines()) == 1


@given(st.sets(st.integers(0, 200), min_size=1))
def test_numbers_are_sorted_and_unique(wanted: set[int]) -> None:
    assert numbers("k", [*wanted, *wanted]) == tuple(sorted(wanted))
    assert numbers("k", [str(number) for number in wanted]) == tuple(sorted(wanted))


@given(st.integers(0, 100), st.integers(0, 100))
def test_ranges_mean_the_same_in_both_spellings(first: int, count: int) -> None:
    last = first + count
    assert numbers("k", f"{first}-{last}") == numbers("k", f"{first}:{last + 1}") == tuple(range(first, last + 1))


@pytest.mark.parametrize(
    "value",
    ["7-3", "4:4", [], -1, [0, -1], True, 1.5, "a", "1-", "1-2-3", [[1]], {"a": 1}, "0-99999999999", "9" * 5000, "²"],
)
def test_numbers_refuses_the_rest(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"capture\.layers"):
        numbers("capture.layers", value)


@pytest.mark.parametrize("empty", ["5-2", "4:4", "4:0"])
def test_a_range_that_names_nothing_is_refused_beside_others_too(empty: str) -> None:
    """It would be left out without a word."""
    with pytest.raises(ConfigError, match=f"capture.layers has '{empty}', which names nothing"):
        numbers("capture.layers", [empty, 0])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=every_kind", "sampler=uniform", "sampler.bucket_size=7"],
        ["dataset=jsonl", "dataset.path=some/where.jsonl", "dataset.id_column=id", "capture.layers='0-3'"],
        ["model=llama3", "model.weights=random", "model.config_overrides={a: {b: 1}}", "seed=9"],
        ["model=checkpoint", "model.checkpoint=./mine"],
    ],
)
def test_rerun_composes_to_the_same_configuration(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir(), elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    first = composed(*overrides)
    save_config(run, first)
    expected = plain_values(first)
    monkeypatch.chdir(elsewhere)
    again = composed(folder=run, name="rerun")
    assert plain_values(again) == expected
    assert yaml.safe_load((run / "config.yaml").read_text()) == {
        key: value for key, value in expected.items() if key not in ONCE
    }


@pytest.mark.parametrize("call", ["open to write", "write", "fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_saved_configuration_is_whole_or_not_there(tmp_path: Path, call: str, at: int) -> None:
    """Half of one may be another that can be run. Whatever has config.yaml has both files."""
    with (
        failing(Disk(tmp_path / "run", at, only=(call,))) as disk,
        pytest.raises(CaptureError, match="could not write"),
    ):
        save_config(tmp_path / "run", composed("seed=3"))
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert disk.failed and there <= {"rerun.yaml"}
    save_config(tmp_path / "run", composed("seed=3"))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 3


def test_a_rerun_can_be_overridden(tmp_path: Path) -> None:
    save_config(tmp_path, composed("seed=3"))
    assert composed("sampler.base_rate=2.5", folder=tmp_path, name="rerun").sampler.base_rate == 2.5


def test_a_hub_id_stays_an_id_and_a_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "local").mkdir(parents=True)
    for checkpoint, stored in (
        ("owner/remote", "owner/remote"),
        ("owner/local", str(tmp_path / "owner/local")),
        ("embedded:SmolLM2-135M-Instruct", "embedded:SmolLM2-135M-Instruct"),
    ):
        plain = plain_values(composed("model=checkpoint", f"model.checkpoint={checkpoint}"))
        assert plain["model"]["checkpoint"] == stored


@pytest.mark.parametrize("result", ["manifest.json", "captures/"])
def test_a_folder_with_results_is_recognised(tmp_path: Path, result: str) -> None:
    refuse_results(tmp_path)
    (tmp_path / result).mkdir() if result.endswith("/") else (tmp_path / result).touch()
    assert holds_results(tmp_path)
    with pytest.raises(RunError, match="already holds results"):
        refuse_results(tmp_path)


def test_no_heavy_import() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'polars', 'pyarrow'}"
    code = f"import sys, sniffer.__main__, sniffer.terminal.logs; assert not {heavy} & set(sys.modules), [*sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("value", "size"),
    [(1000, 1000), ("1000", 1000), ("8GiB", 8 << 30), ("1.5 kib", 1536), ("500MB", 500_000_000), ("2e9", 2 * 10**9)],
)
def test_sizes_are_read_with_their_units(value: object, size: int) -> None:
    assert OutputConfig(memory_limit=value).memory_limit == size


def test_one_value_is_wanted_where_a_list_is_given():
    cfg = composed("dataset=jsonl", "dataset.path=a", "dataset.id_column=[a,b]")
    with pytest.raises(ConfigError, match=r"dataset.id_column: wanted one value, not the list \['a', 'b'\]"):
        resolve(cfg)


def test_one_kind_is_a_list_of_it() -> None:
    cfg = composed("capture.kinds=q", "dataset=pydoc")
    cfg.model = {"_target_": "sniffer.config.schema.EngineConfig"}
    config = resolve(cfg)
    assert config.capture.kinds == ["q"] and config.saved["capture"]["kinds"] == ["q"]
