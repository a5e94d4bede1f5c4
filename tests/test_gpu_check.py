"""`make gpu-check` goes on after a part that fails, hangs or dies; it runs on a processor too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from sniffer.models import finder

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import wheels, worker
from benchmarks.gpu_check.place import Place

finder.install()

CPU = Place(torch.device("cpu"), full=False)

STAND_IN = """
import os, pathlib, subprocess, sys, time
answers = pathlib.Path(sys.argv[-1])
for line in sys.stdin:
    part = line.strip()
    if part == "runs":
        os._exit(9)
    if part == "tests":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (answers.parent / "child").write_text(str(child.pid))
        time.sleep(60)
    (answers / f"{part}.json").write_text('{"process": %d}' % os.getpid())
"""
"""A worker that dies over one part and hangs over another, with a child of its own."""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict, str]]:
    """Runs some parts with the stand-in: the exit code, and what was written."""

    def call(*words: str) -> tuple[int, dict, str]:
        honest = gpu_check.Hand
        monkeypatch.setattr(gpu_check, "Hand", lambda _, *more: honest([sys.executable, "-c", STAND_IN], *more))
        monkeypatch.setattr(wheels, "environment", lambda root: dict(os.environ))
        monkeypatch.setattr(gpu_check.tempfile, "mkdtemp", lambda: str(made(tmp_path / "answers")))
        monkeypatch.setitem(gpu_check.SECONDS, "tests", 3)
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        monkeypatch.setattr(sys, "argv", ["gpu_check", *words])
        code = gpu_check.main()
        return code, json.loads((tmp_path / "out" / "gpu.json").read_text()), (tmp_path / "out" / "gpu.txt").read_text()

    return call


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.long
def test_it_goes_on_after_a_part_that_hangs_or_dies(check: Callable[..., tuple[int, dict, str]], tmp_path: Path):
    code, found, text = check("environment", "runs", "tests", "probes")
    assert code == 1
    assert "exit code 9" in found["runs"]["failed"] and "gpu.log" in found["runs"]["failed"]
    assert found["tests"]["failed"] == "it took more than 3 seconds"
    assert found["environment"]["process"] != found["probes"]["process"]
    assert text.startswith("environment\n    process") and "\nprobes\n" in text
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "what a part has begun ends with it"
        time.sleep(0.05)


def test_no_part_begins_when_the_time_is_over(check: Callable[..., tuple[int, dict, str]]):
    code, found, _ = check("environment", "--minutes", "0.000001")
    assert code == 0 and found["environment"]["skipped"] == "the time was over"


def test_every_part_has_its_time_and_its_code():
    assert list(gpu_check.SECONDS) == list(worker.PARTS)


def test_a_part_that_raises_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch):
    def broken(place: Place) -> dict:
        raise RuntimeError("CUDA error: no such luck\nsecond line")

    monkeypatch.setitem(worker.PARTS, "runs", broken)
    assert worker.do("runs", CPU) == {"failed": "RuntimeError: CUDA error: no such luck"}


@pytest.mark.long
def test_parts_run_on_a_processor():
    found = {
        part: worker.do(part, CPU) for part in ("new_lengths", "probes", "synchronisations", "beside_the_processor")
    }
    assert found["new_lengths"].keys() >= {"without cudnn", "cudnn"}
    assert all(probe["accepted"] for probe in found["probes"].values())
    assert set(found["beside_the_processor"].values()) == {0.0}


def test_what_waits_in_a_forward_is_transformers_own():
    """Once for each kind of mask: gemma3 has two. Nothing of ours reads a result of the device."""
    found = worker.do("synchronisations", CPU)
    counts = {family: sum(told["reads of results"].values()) for family, told in found.items()}
    assert counts == {"llama": 1, "gemma3_text": 2, "qwen3_moe": 1, "mixtral": 1}
    assert all(place.startswith("transformers/") for told in found.values() for place in told["reads of results"])


def test_a_read_of_ours_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    from benchmarks.gpu_check import parts

    monkeypatch.setattr(parts, "shown", lambda backbone, ids: bool((ids >= 0).all()))
    told = parts._waits(None, torch.zeros(1, 4, dtype=torch.long))  # type: ignore[arg-type]
    assert sum(told["reads of results"].values()) == 1 and "tests/test_gpu_check.py" in str(told)


def test_the_table_has_a_line_for_each_value():
    text = gpu_check.table({"speed": {"8B": {"bare": 31234.5, "ratio": 0.98123}, "ok": True, "seconds": 2.5}})
    assert text == "speed\n    8B, bare   31,234\n    8B, ratio  0.9812\n    ok         true\n    seconds    2.5\n"


def test_what_a_machine_lacks_comes_from_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What it has is left as it is."""
    folder = tmp_path / wheels.FOLDER
    folder.mkdir(parents=True)
    for name in ("lacked_here", "torch"):
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "VALUE = 7\n")
            info = f"{name}-1.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(wheels, "WHEELS", {"lacked_here": "lacked-here==1.0", "torch": "torch==1.0"})
    environment = wheels.environment(tmp_path)
    said = "import lacked_here; print(lacked_here.VALUE)"
    done = subprocess.run([sys.executable, "-c", said], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "7"
    site = Path(environment["PYTHONPATH"].split(os.pathsep)[-1])
    assert [path.name for path in site.glob("*.py")] == ["lacked_here.py"]
