"""What must not cost a row: kills, signals, a full disk, damaged files, two processes on one folder.

Run by `make faults`; not part of `make test`, since it takes some minutes.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sniffer.storage.manifest import Manifest
from tests.faults.conftest import Patient, Whole
from tests.faults.driver import Command, Fault

Survived = Callable[[str], None]

MOMENTS = random.Random(4)
KILLS = [MOMENTS.uniform(0, 1.1) for _ in range(20)]
INTERRUPTS = [MOMENTS.uniform(0, 1.1) for _ in range(10)]
"""Shares of the time that the uninterrupted run captures for."""


def wait(patient: Patient, command: Command, share: float) -> None:
    """Until a share of the run's time after its manifest has appeared."""
    command.wait_for(patient.folder / "manifest.json")
    time.sleep(share * patient.whole.seconds)


def wait_for_commit(patient: Patient, command: Command) -> None:
    """Until two commits are on disk, and the run goes on."""
    command.wait_for(patient.folder / "captures/layer=01/kind=q/part-00001.parquet")


@pytest.mark.parametrize("share", KILLS)
def test_kill_at_a_random_moment(patient: Patient, share: float, survived: Survived):
    command = patient.start()
    wait(patient, command, share)
    command.send(signal.SIGKILL)
    assert command.wait() in (-signal.SIGKILL, 0)
    verify = patient.verb("verify")
    assert verify.wait() == 0, verify.text  # what was committed is right, without any resume
    patient.must_recover()
    survived("kill -9 at a random moment")


@pytest.mark.parametrize("step", [*range(1, 12), *range(12, 200, 17)])
def test_kill_before_a_step_to_the_disk(patient: Patient, step: int, survived: Survived):
    command = patient.start(fault=Fault(kill_at_step=step))
    assert command.wait() == -signal.SIGKILL, command.text
    if (patient.folder / "manifest.json").exists():
        verify = patient.verb("verify")
        assert verify.wait() == 0, verify.text
    if not (patient.folder / "config.yaml").exists():
        # There is nothing to go on with, and nothing that keeps the same command from beginning anew.
        resume = patient.verb("resume")
        assert resume.wait() == 1 and "run its command again" in resume.text, resume.text
        again = patient.start()
        assert again.wait() == 0, again.text
    patient.must_recover()
    survived("kill -9 right before a flush or rename")


@pytest.mark.parametrize("steps", [(40, 12, 30), (90, 3, 3)])
def test_kill_again_and_again(patient: Patient, steps: tuple[int, ...], survived: Survived):
    assert patient.start(fault=Fault(kill_at_step=steps[0])).wait() == -signal.SIGKILL
    for step in steps[1:]:
        assert patient.verb("resume", fault=Fault(kill_at_step=step)).wait() == -signal.SIGKILL
    patient.must_recover()
    survived("kill -9 of resumes too")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_kill_with_pending_parts(patient: Patient, share: float, survived: Survived):
    limits = ("output.checkpoint_every=null", "output.memory_limit=60kB")
    command = patient.start(*limits)
    wait(patient, command, share)
    command.send(signal.SIGKILL)
    command.wait()
    patient.must_recover()
    survived("kill -9 under a memory limit")


@pytest.mark.parametrize("share", INTERRUPTS)
def test_interrupt_at_a_random_moment(patient: Patient, share: float, survived: Survived):
    command = patient.start()
    wait(patient, command, share)
    command.send(signal.SIGINT)
    code = command.wait()
    manifest = Manifest.load(patient.folder)
    if manifest.status == "interrupted":
        assert code == 130 and manifest.reason == "Stopped: SIGINT"
        assert f"python -m sniffer.runs resume {patient.folder}" in command.text
        assert not manifest.pending
    verify = patient.verb("verify")
    assert verify.wait() == 0, verify.text
    patient.must_recover()
    survived("Ctrl-C at a random moment")


def test_terminate(patient: Patient, survived: Survived):
    command = patient.start()
    wait_for_commit(patient, command)
    command.send(signal.SIGTERM)
    assert command.wait() == 143
    assert Manifest.load(patient.folder).reason == "Stopped: SIGTERM"
    patient.must_recover()
    survived("SIGTERM")


@pytest.mark.parametrize("between", [0.0, 0.02])
def test_a_second_interrupt_stops_at_once(patient: Patient, between: float, survived: Survived):
    command = patient.start()
    wait_for_commit(patient, command)
    command.send(signal.SIGINT)
    time.sleep(between)
    command.send(signal.SIGINT)
    assert command.wait() == 130
    assert patient.verb("verify").wait() == 0
    patient.must_recover()
    survived("two Ctrl-C")


@pytest.mark.parametrize("free_kib", [20, 100, 250])
def test_a_full_disk(patient: Patient, tmp_path: Path, free_kib: int, survived: Survived):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root; test_a_file_that_cannot_grow always runs")
    on_disk = Patient(disk / "run", patient.whole)
    try:
        command = on_disk.start()
        command.wait_for(on_disk.folder / "manifest.json")
        # Another program takes the space that the estimate has counted on.
        ballast = shutil.disk_usage(disk).free - free_kib * 1024
        (disk / "ballast").write_bytes(bytes(ballast))
        assert command.wait() == 1, command.text
        assert "No space left on device" in command.text
        shutil.copytree(on_disk.folder, patient.folder)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    verify = patient.verb("verify")
    assert verify.wait() == 0, verify.text
    patient.must_recover()
    survived("a full disk")


@pytest.mark.parametrize("kib", [20, 30])
def test_a_file_that_cannot_grow(patient: Patient, kib: int, survived: Survived):
    command = patient.start(fault=Fault(largest_file=kib * 1024))
    assert command.wait() == 1, command.text
    assert "File too large" in command.text
    patient.must_recover()
    survived("a file that cannot grow")


FILES = {
    "a part": "captures/layer=01/kind=k/part-00001.parquet",
    "examples.parquet": "examples.parquet",
    "the twin of examples.parquet": ".examples.parquet",
    "manifest.json": "manifest.json",
    "the twin of manifest.json": ".manifest.json",
    "config.yaml": "config.yaml",
    "rerun.yaml": "rerun.yaml",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, whole: Whole) -> Path:
    """A complete run, to be copied and damaged."""
    finished = Patient(tmp_path_factory.mktemp("finished") / "run", whole)
    assert finished.start().wait() == 0
    return finished.folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, whole: Whole) -> Path:
    """An interrupted run, to be copied and damaged."""
    stopped = Patient(tmp_path_factory.mktemp("stopped") / "run", whole)
    command = stopped.start()
    wait_for_commit(stopped, command)
    command.send(signal.SIGINT)
    assert command.wait() == 130
    return stopped.folder


@pytest.fixture(params=["complete", "interrupted"])
def copied(request: pytest.FixtureRequest, patient: Patient, finished: Path, stopped: Path) -> Patient:
    shutil.copytree(finished if request.param == "complete" else stopped, patient.folder)
    return patient


def flip(file: Path, share: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    file.write_bytes(content)


def must_be_found(patient: Patient, path: str) -> None:
    verify = patient.verb("verify")
    assert verify.wait() == 1, verify.text
    assert path.rpartition("/")[2] in verify.text


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("what", FILES)
def test_a_flipped_byte(copied: Patient, what: str, share: float, survived: Survived):
    flip(copied.folder / FILES[what], share)
    if share == 1.0 and what in ("config.yaml", "rerun.yaml"):
        flip(copied.folder / FILES[what], 0.9)  # the last byte only ends the line
    must_be_found(copied, FILES[what])
    copied.must_recover(*(["--restore"] if what in ("config.yaml", "rerun.yaml") else []))
    survived(f"a flipped byte in {what}")


@pytest.mark.parametrize("what", FILES)
def test_a_truncated_file(copied: Patient, what: str, survived: Survived):
    file = copied.folder / FILES[what]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    must_be_found(copied, FILES[what])
    copied.must_recover(*(["--restore"] if what in ("config.yaml", "rerun.yaml") else []))
    survived(f"{what} cut short")


@pytest.mark.parametrize("what", FILES)
def test_a_removed_file(copied: Patient, what: str, survived: Survived):
    (copied.folder / FILES[what]).unlink()
    must_be_found(copied, FILES[what])
    copied.must_recover(*(["--restore"] if what in ("config.yaml", "rerun.yaml") else []))
    survived(f"{what} removed")


def test_everything_but_one_manifest_removed(copied: Patient, survived: Survived):
    for path in ("manifest.json", "examples.parquet", ".examples.parquet", "captures", "config.yaml", "rerun.yaml"):
        target = copied.folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    copied.must_recover("--restore")
    survived("all but the manifest's twin removed")


def test_a_foreign_file_is_named_and_left_alone(copied: Patient, survived: Survived):
    foreign = copied.folder / "captures" / "layer=01" / "notes.txt"
    foreign.write_text("mine")
    must_be_found(copied, "notes.txt")
    assert copied.verb("resume").wait() == 0
    assert foreign.read_text() == "mine"
    foreign.unlink()
    copied.must_recover()
    survived("a foreign file")


def test_two_processes_on_one_folder(patient: Patient, survived: Survived):
    first = patient.start()
    first.wait_for(patient.folder / "manifest.json")
    resume, verify, again = patient.verb("resume"), patient.verb("verify"), patient.verb("resume", "--force")
    assert resume.wait() == 1 and "another process" in resume.text
    assert verify.wait() == 1 and "still being written" in verify.text
    assert again.wait() == 1 and "another process" in again.text
    assert first.wait() == 0
    patient.must_recover()
    survived("two processes on one folder")
