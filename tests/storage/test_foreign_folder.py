"""A run folder may come from anyone: of it Hydra gets what rerun.yaml says, and trust is only what was typed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from sniffer.config import trust as saved
from sniffer.config.resolve import conf_folder, register
from sniffer.config.saving import saved_config
from sniffer.config.trust import Trust
from sniffer.errors import RunError
from sniffer.storage.manifest import Manifest
from sniffer.terminal.summary import resume_line
from tests.helpers_config import save_config

CHEAP = ["model=llama3", "model.weights=random", "dataset=pydoc"]
Invoke = Callable[..., int]


OPENED: list[Path] | None = None


def _note(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], str | Path):
        OPENED.append(Path(arguments[0]).absolute())


sys.addaudithook(_note)


@contextmanager
def opened_below(folder: Path) -> Iterator[set[str]]:
    """The files of a folder that Python opens meanwhile, however: an audit hook is told of each."""
    global OPENED
    found: set[str] = set()
    OPENED = []
    try:
        yield found
    finally:
        real = [path.resolve() for path in OPENED]
        found |= {path.relative_to(folder).as_posix() for path in real if path.is_relative_to(folder)}
        OPENED = None


PLANTED = (
    "hydra/config",
    "hydra/sweeper/basic",
    "hydra/launcher/basic",
    "hydra/output/default",
    "hydra/help/default",
    "hydra/env/default",
    "hydra/job_logging/rich",
    "hydra/hydra_logging/default",
    "sampler/log_uniform",
)
EVIL = """# @package hydra.callbacks.evil
_target_: pathlib.Path.write_text
self: {_target_: pathlib.Path, _args_: [MARK]}
data: ran
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves, without its rows."""
    register()
    folder = tmp_path_factory.mktemp("whole")
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        save_config(folder, compose("config", [*CHEAP, "seed=5"]))
    Manifest("complete", 5, {}, {}, {}, geometry=(), selection={}, config=saved_config(folder)).save(folder)
    (folder / ".hydra").mkdir()
    for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
        (folder / ".hydra" / name).write_text("hydra: {}\n")
    return folder


@pytest.fixture
def foreign(run_folder: Path, tmp_path: Path) -> Path:
    """A run folder in which files lie that Hydra would take for its own settings."""
    folder = Path(shutil.copytree(run_folder, tmp_path / "theirs"))
    for name in PLANTED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(EVIL.replace("MARK", str(tmp_path / "mark")))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["-cd", "theirs", "-cn", "rerun"],
        ["--config-dir=theirs", "--config-name=rerun.yaml"],
        ["--config-di", "theirs/", "--config-n", "RERUN"],
        ["-cd", ".", "-cn", "theirs/rerun"],
        ["-cn", "./theirs/rerun"],
    ],
)
def test_of_a_run_folder_hydra_gets_rerun_yaml_and_nothing_else(
    invoke: Invoke, ran: list, foreign: Path, tmp_path: Path, words: list[str]
):
    with opened_below(foreign) as opened:
        assert invoke(*words, "sampler.base_rate=3") == 0
    # The manifest by us, within bounds: what the run was made of is compared.
    assert opened == {"rerun.yaml", "manifest.json"}
    assert (ran[0].seed, ran[0].sampler.base_rate) == (5, 3.0)
    assert not (tmp_path / "mark").exists()


def test_a_sweep_over_a_run_folder_opens_nothing_else_either(invoke: Invoke, ran: list, foreign: Path, tmp_path: Path):
    with opened_below(foreign) as opened:
        assert invoke("-m", "-cd", "theirs", "-cn", "rerun", "seed=1,2") == 0
    assert opened == {"rerun.yaml"} and [config.seed for config in ran] == [1, 2]
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("words", [["--cfg", "job"], ["--help"], ["--info", "searchpath"]])
def test_what_shows_a_rerun_opens_nothing_else(invoke: Invoke, foreign: Path, capsys: pytest.CaptureFixture, words):
    with opened_below(foreign) as opened:
        try:
            assert invoke("-cd", "theirs", "-cn", "rerun", *words) == 0
        except SystemExit as end:  # Hydra's own, after its help
            assert not end.code
    assert opened == {"rerun.yaml"}
    assert "seed: 5" in capsys.readouterr().out or words[0] != "--cfg"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-cd", "theirs"], "-cn rerun"),
        (["-cd", "theirs", "-cn", "config"], "-cn rerun"),
        (["-cd", "theirs", "-cn", "hydra/config"], "-cn rerun"),
        (["-cp", "{here}/theirs", "-cn", "config"], "-cn rerun"),
        (["-cp", "{here}/theirs", "-cn", "rerun"], "with -cd"),
        (["-cn", "rerun"], "with -cd"),
        (["-cn", "{up}/theirs/config"], "-cn rerun"),
        (["-cd", "theirs/.hydra", "-cn", "hydra"], "-cn rerun"),
        (["-cd", "sweep", "-cn", "multirun"], "-cn rerun"),
        (["hydra.searchpath=[file://{here}/theirs]"], "-cn rerun"),
        (["-cd", "mine", "-cn", "searching"], "-cn rerun"),
        (["experiment=../{up}/theirs/config"], "-cn rerun"),
        (["-cd", "mine", "-cn", "config"], "give it another name"),
        (["-cd", "nowhere", "-cn", "rerun"], "has no rerun.yaml"),
        (["--experimental-rerun", "theirs/config.pickle"], "a pickle"),
    ],
)
def test_no_other_way_leads_into_a_run_folder(
    invoke: Invoke, ran: list, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words, named: str
):
    for name in ("mine", "sweep"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("seed: 9\n")
    searching = f"defaults: [config, _self_]\nhydra: {{searchpath: ['file://{foreign}']}}\n"
    (tmp_path / "mine" / "searching.yaml").write_text(searching)
    (tmp_path / "sweep" / "multirun.yaml").write_text("hydra: {}\n")
    places = {"here": tmp_path, "up": os.path.relpath(tmp_path, conf_folder())}
    with opened_below(foreign) as opened:
        assert invoke(*(word.format(**places) for word in words)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and named in lines[0], lines
    assert opened == set() and ran == [] and not (tmp_path / "mark").exists()


def test_a_folder_of_ones_own_is_composed(invoke: Invoke, ran: list, tmp_path: Path):
    (tmp_path / "mine" / "sampler").mkdir(parents=True)
    (tmp_path / "mine" / "study.yaml").write_text("defaults: [config, override sampler: dense, _self_]\nseed: 7\n")
    dense = (conf_folder() / "sampler" / "log_uniform.yaml").read_text().replace("base_rate: 1.0", "base_rate: 9.0")
    (tmp_path / "mine" / "sampler" / "dense.yaml").write_text(dense)
    assert invoke("-cd", "mine", "-cn", "study", *CHEAP) == 0
    assert (ran[0].seed, ran[0].sampler.base_rate) == (7, 9.0)


class Mine:
    """A sampler of a package that is not ours."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "code"),
    [([], 1), (["trusted_targets=[other.]"], 1), (["trusted_targets=[other.,'tests.']"], 0)],
)
def test_trust_is_typed_not_swept(
    invoke: Invoke, ran: list, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], code: int
):
    """What a configuration's sweeper adds to a job's words was typed by nobody."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.yaml").write_text(
        "defaults: [config, _self_]\nhydra: {sweeper: {params: {+trusted_targets: '[tests.]', seed: '1,2'}}}\n"
    )
    mine = ["~sampler", f"+sampler={{_target_: {__name__}.Mine}}"]
    assert invoke("-m", "-cd", "mine", "-cn", "study", *CHEAP, *mine, *words) == code
    assert [type(config.sampler) for config in ran] == ([] if code else [Mine, Mine])
    assert code == 0 or "trusted_targets" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["10.0.0.5:6379", "ray://elsewhere:10001"])
def test_no_cluster_is_joined_that_was_not_typed(
    invoke: Invoke, ran: list, foreign: Path, capsys: pytest.CaptureFixture, address: str
):
    for name in ("config.yaml", "rerun.yaml"):
        text = (foreign / name).read_text()
        text = text.replace("name: local", "name: ray").replace("address: null", f"address: {address}")
        (foreign / name).write_text(text)
    assert invoke("-cd", "theirs", "-cn", "rerun") == 1
    assert f"at {address} (engine.address): add engine.address={address}" in capsys.readouterr().err
    plain = saved.needed_config(foreign)
    with pytest.raises(RunError, match=f"add --engine-address {address}"):
        saved.build(plain, Trust(), foreign / "config.yaml")
    for trust in (Trust(address=address), Trust(address="mine:1")):
        assert saved.allowed(plain, trust, foreign)["engine"]["address"] == trust.address
    assert saved.allowed(plain | {"engine": {"name": "ray", "address": "auto"}}, Trust(), foreign)


def test_the_way_to_go_on_names_the_cluster_that_was_typed(tmp_path: Path):
    here, there = (
        resume_line(tmp_path, Manifest("interrupted", 0, {}, {}, {}, (), {}, config={"engine": {"address": address}}))
        for address in ("auto", "10.0.0.5:6379")
    )
    assert here.endswith(f"resume {tmp_path}")
    assert there.endswith(f"resume {tmp_path} --engine-address 10.0.0.5:6379")
