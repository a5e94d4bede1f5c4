"""The command line: one line per error, folders that are never overwritten, sweeps, interruption."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException

from sniffer.config.schema import Config
from sniffer.errors import CaptureError
from sniffer.runs.resume import never_began
from sniffer.storage.durable import HashedFile
from sniffer.storage.manifest import Manifest
from sniffer.words import one_line
from tests.helpers_disk import Disk, failing

REPOSITORY = Path(__file__).parents[1]
# A model that needs no network, and no torch import until it loads, which it never does here.
CHEAP = ["model=llama3", "model.weights=random", "dataset=pydoc"]

BEFORE_ITS_MANIFEST = {668: CaptureError("no room"), 669: PermissionError(13, "no", "x"), 670: KeyboardInterrupt()}

Invoke = Callable[..., int]


@pytest.fixture
def ran() -> list[tuple[Config, Path]]:
    """What the stand-in for sniffer.capture.run was called with."""
    return []


@pytest.fixture
def stand_in(ran: list[tuple[Config, Path]]) -> Callable[..., None]:
    """A capture that only notes, and fails for some seeds."""

    def run(config: Config, folder: Path, **_: object) -> None:
        logging.getLogger("sniffer").info("captured")
        if config.seed in BEFORE_ITS_MANIFEST:
            raise BEFORE_ITS_MANIFEST[config.seed]
        ran.append((config, folder))
        Manifest("complete", config.seed, {}, {}, {}, geometry=(), selection={}).save(folder)
        if config.seed == 666:
            raise CaptureError("no room: free some")
        if config.seed == 667:
            raise KeyboardInterrupt

    return run


def test_a_run_gets_real_objects_and_its_own_folder(invoke: Invoke, ran: list, tmp_path: Path) -> None:
    assert invoke(*CHEAP, "sampler.base_rate=3") == 0
    assert invoke(*CHEAP) == 0
    (first, first_folder), (_, second_folder) = ran
    assert first.sampler.base_rate == 3.0
    assert first_folder.parent == second_folder.parent == tmp_path / "outputs"
    assert first_folder != second_folder
    assert {"config.yaml", "rerun.yaml", "sniffer.log", ".hydra"} <= {path.name for path in first_folder.iterdir()}
    assert "captured" in (first_folder / "sniffer.log").read_text()
    assert Path.cwd() == tmp_path


def test_a_run_can_be_run_again_from_elsewhere(
    invoke: Invoke, ran: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert invoke(*CHEAP, "dataset=jsonl", "dataset.path=a.jsonl", "seed=5") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert invoke("-cd", str(ran[0][1]), "-cn", "rerun") == 0
    assert ran[1][0] == ran[0][0]
    assert ran[1][1].parent == tmp_path / "elsewhere" / "outputs"
    assert (ran[1][1] / "config.yaml").read_bytes() == (ran[0][1] / "config.yaml").read_bytes()


def test_what_a_rerun_is_made_of_is_compared_with_the_run(invoke: Invoke, ran: list) -> None:
    assert invoke(*CHEAP, "hydra.run.dir=first") == 0
    code = {"transformers.models.llama.modeling_llama": "local copy, sha256:0"}
    first = Manifest.load(Path("first"))
    replace(first, model={"files": {"a": "sha256:1"}}, backbone={"code": code}).save(Path("first"))
    assert invoke("-cd", "first", "-cn", "rerun", "hydra.run.dir=again") == 0
    assert "first was made with something else: model.files.a: sha256:1 then" in Path("again/sniffer.log").read_text()
    Manifest.load(Path("again")).save(Path("first"))
    assert invoke("-cd", "first", "-cn", "rerun", "hydra.run.dir=third") == 0
    assert "something else" not in Path("third/sniffer.log").read_text()


def test_results_are_never_overwritten(invoke: Invoke, ran: list, capsys: pytest.CaptureFixture) -> None:
    assert invoke(*CHEAP, "hydra.run.dir=out", "seed=1") == 0
    before = snapshot(Path("out"))
    assert invoke(*CHEAP, "hydra.run.dir=out", "seed=2") == 1
    assert len(ran) == 1
    assert snapshot(Path("out")) == before
    assert "already holds results" in only_line(capsys)


def test_a_refused_run_leaves_its_folder_usable(invoke: Invoke, ran: list) -> None:
    assert invoke(*CHEAP, "hydra.run.dir=out", "sampler.base_rate=-1") == 1
    assert invoke(*CHEAP, "hydra.run.dir=out") == 0
    assert len(ran) == 1


REFUSALS = {
    "its values": ["sampler.base_rate=-1"],
    "its model": ["model=checkpoint", "model.checkpoint=./nowhere"],
    "its capture": ["seed=668"],
    "the system": ["seed=669"],
    "its plan": ["plan=true", "sampler.base_rate=-1"],
}


@pytest.mark.parametrize("why", REFUSALS)
@pytest.mark.parametrize("place", [[], ["hydra.run.dir=a/b/c"]])
def test_a_refused_run_leaves_no_folder(
    invoke: Invoke, ran: list, tmp_path: Path, place: list[str], why: str, capsys: pytest.CaptureFixture
) -> None:
    assert invoke(*CHEAP, *REFUSALS[why], *place) == 1
    assert list(tmp_path.iterdir()) == [] and ran == []
    only_line(capsys)


def test_a_refused_run_takes_away_nothing_else(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine" / "empty").mkdir(parents=True)
    assert invoke(*CHEAP, "seed=668", "hydra.run.dir=mine/empty") == 1
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine", tmp_path / "mine" / "empty"]
    (tmp_path / "mine" / "notes").write_text("mine")
    (tmp_path / "mine" / "config.yaml").write_text("mine")
    assert invoke(*CHEAP, "sampler.base_rate=-1", "hydra.run.dir=mine") == 1
    assert {"notes", "config.yaml", "empty"} <= {path.name for path in (tmp_path / "mine").iterdir()}


def test_a_run_that_is_stopped_while_its_model_loads_can_be_resumed(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke(*CHEAP, "seed=670", "hydra.run.dir=out") == 130
    assert never_began(tmp_path / "out")


def test_a_sweep_has_a_folder_per_job(invoke: Invoke, ran: list) -> None:
    assert invoke("-m", *CHEAP, "sampler.base_rate=0.5,1", "capture.layers=[0],[3]") == 0
    assert [(c.sampler.base_rate, c.capture.layers) for c, _ in ran] == [
        (rate, layers) for rate in (0.5, 1.0) for layers in ((0,), (3,))
    ]
    assert [folder.name for _, folder in ran] == ["0", "1", "2", "3"]
    assert len({folder.parent for _, folder in ran}) == 1
    for config, folder in ran:
        assert yaml.safe_load((folder / "config.yaml").read_text())["sampler"]["base_rate"] == config.sampler.base_rate


def test_a_failed_job_of_a_sweep_does_not_stop_the_others(
    invoke: Invoke, ran: list, capsys: pytest.CaptureFixture
) -> None:
    assert invoke("-m", *CHEAP, "sampler.base_rate=1,-2,3") == 1
    assert [config.sampler.base_rate for config, _ in ran] == [1.0, 3.0]
    assert "sampler.base_rate=-2" in only_line(capsys)


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("sampler=nope", ["sampler/nope", "all, log_uniform, per_side, uniform"]),
        ("sampler=null", ["Config group", "NoneType"]),
        ("nope=1", ["nope", "--cfg job"]),
        ("sampler.bse_rate=1", ["sampler.bse_rate", "--cfg job"]),
        ("dataset.shard={idx: 1}", ["dataset.shard", "+dataset.shard"]),
        ("seed=x", ["seed=x", "Integer"]),
        ("capture.head_sampling.count=many", ["capture.head_sampling.count=many", "Integer"]),
        ("sampler.base_rate=fast", ["sampler.base_rate", "Float"]),
        ("seed", ["'seed' is no KEY=VALUE"]),
        ("dataset.where=n > 3", ["dataset.where=n > 3 cannot be read", "\"dataset.where='n > 3'\""]),
        ("seed=1,2", ["seed=1,2 gives several values", "add -m"]),
        ("model=[null]", ["Hydra, TypeError"]),
        ("model=[[]]", ["Hydra, TypeError"]),
        ("engine.start_timeout=1" + "0" * 400, ["engine.start_timeout: int too large"]),
        ("sampler.base_rate=1" + "0" * 400, ["sampler cannot be built", "too large"]),
        ("sampler.base_rate=1e400", ["sampler.base_rate=inf"]),
        ("output.memory_limit=1e400", ["output.memory_limit=inf is not a size"]),
        ("model.checkpoint=" + "x" * 5000, ["cannot be a path: File name too long"]),
        ("model.checkpoint=1" + "0" * 400, ["cannot be a path: File name too long"]),
        ("seed=666", ["no room: free some"]),
        ("model.checkpoint=", ["model.checkpoint is empty"]),
        ("+dataset.path=' '", ["dataset.path is empty"]),
    ],
)
def test_an_error_is_one_line(invoke: Invoke, capsys: pytest.CaptureFixture, argument: str, names: list[str]) -> None:
    assert invoke(*CHEAP, argument) == 1
    line = only_line(capsys)
    assert all(name in line for name in names), line


def test_a_folder_that_cannot_be_made_is_one_line(
    invoke: Invoke, ran: list, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert invoke(*CHEAP, "hydra.run.dir=file") == 1
    assert "file: File exists" in only_line(capsys)
    assert ran == []


def test_what_the_system_refuses_is_one_line_wherever_it_does(
    invoke: Invoke, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(sys.modules["sniffer.capture"], "run", denied)
    assert invoke(*CHEAP) == 1
    assert "/somewhere: Permission denied" in only_line(capsys)


def test_a_full_disk_is_one_line(
    invoke: Invoke, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HashedFile, "write", full)
    assert invoke(*CHEAP) == 1
    assert "No space left on device" in only_line(capsys)


@pytest.mark.parametrize("what", ["stat manifest.json", "flock .lock", "open to write sniffer.log"])
def test_a_disk_that_fails_is_one_line_or_none(
    invoke: Invoke, ran: list, capsys: pytest.CaptureFixture, tmp_path: Path, what: str
) -> None:
    """The log is a copy: a run goes on without it."""
    call, name = what.rsplit(" ", 1)
    at = 3 if call == "stat" else 1  # the first two are asked for by Hydra, which words their failure itself
    with failing(Disk(tmp_path / "run", at, only=(call,), names=(name,))) as disk:
        code = invoke(*CHEAP, "hydra.run.dir=run")
    assert disk.failed == [what]
    assert code == (0 if call.startswith("open") else 1)
    if code:
        assert "Input/output error" in only_line(capsys) and ran == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text + "hydra:\n  callbacks:\n    x:\n      _target_: builtins.exit\n", "has hydra"),
        (lambda text: text.replace("  - common\n", "  - common\n  - override hydra/launcher: x\n"), "has defaults"),
        (lambda text: "# @package hydra\n" + text, "has defaults"),
        (lambda text: text.replace("seed: 0", "seed: ${oc.env:HOME}", 1), "is an interpolation"),
        (lambda text: text.replace("trust_remote_code: false", "trust_remote_code: true"), "trust_remote_code=true"),
        (lambda text: text.replace("models.backbone.Checkpoint", "subprocess.Popen"), "outside sniffer."),
        (lambda _: "{", "could not read"),
        (lambda _: "- a\n", "has defaults"),
    ],
)
def test_a_rerun_from_someone_else_does_no_more_than_a_run(
    invoke: Invoke, ran: list, capsys: pytest.CaptureFixture, change: Callable[[str], str], named: str
) -> None:
    assert invoke(*CHEAP) == 0
    file = ran.pop()[1] / "rerun.yaml"
    text = file.read_text()
    file.write_text(change(text))
    assert file.read_text() != text
    assert invoke("-cd", str(file.parent), "-cn", "rerun") == 1
    assert named in only_line(capsys)
    assert ran == []


def test_a_rerun_composes_nothing_else_from_its_folder(
    invoke: Invoke, ran: list, capsys: pytest.CaptureFixture
) -> None:
    assert invoke(*CHEAP) == 0
    folder = ran.pop()[1]
    (folder / "schema.yaml").write_text("defaults: [{evil@hydra.callbacks: x}]\n")
    assert invoke("-cd", str(folder), "-cn", "rerun") == 1
    assert "schema.yaml is no file of a run" in only_line(capsys)
    assert ran == []


def test_the_command_line_can_let_a_checkpoint_of_a_rerun_run_code(invoke: Invoke, ran: list) -> None:
    assert invoke(*CHEAP, "model.trust_remote_code=true") == 0
    rerun = ["-cd", str(ran[0][1]), "-cn", "rerun"]
    assert invoke(*rerun) == 1
    assert invoke(*rerun, "model.trust_remote_code=true") == 0
    assert ran[1][0].model.trust_remote_code


def test_the_traceback_can_be_asked_for(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(CaptureError):
        invoke(*CHEAP, "seed=666")


def test_an_interrupt_is_one_line(invoke: Invoke, capsys: pytest.CaptureFixture) -> None:
    assert invoke(*CHEAP, "seed=667") == 130
    assert only_line(capsys) == "interrupted"


def test_the_environment_is_given_back(invoke: Invoke) -> None:
    invoke(*CHEAP, "seed=666")
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_one_line_of_an_empty_message() -> None:
    assert one_line(HydraException("")) == "HydraException"


def test_help_and_errors_from_any_folder(tmp_path: Path) -> None:
    shown = command(tmp_path, "--help")
    assert shown.returncode == 0
    for taught in ("log_uniform", "smollm2", "capture.kinds", "sampler.base_rate", "-cn rerun"):
        assert taught in shown.stdout
    assert shown.stderr == ""
    wrong = command(tmp_path, "sampler=nope")
    assert wrong.returncode == 1
    assert len(wrong.stderr.splitlines()) == 1
    assert wrong.stdout == ""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sniffer", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def only_line(capsys: pytest.CaptureFixture) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
