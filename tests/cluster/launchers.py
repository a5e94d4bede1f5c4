"""Sweeps by Hydra's launchers, for real: joblib's processes, submitit's here, and a SLURM cluster of one node.

Run by `make cluster-test`. SLURM's daemons are started here, as root and with Debian's packages slurm-wlm and munge;
without them that test is left out, and says so.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from sniffer import open_run
from sniffer.reader.sweep import Sweep
from tests.cluster.conftest import Command, Place
from tests.cluster.slurm import Slurm, missing

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
SUBMITIT = ("hydra/launcher=submitit_local",)
SHARDS = ("dataset.shard.count=3", "dataset.shard.index=0,1,2")


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory):
    if lacks := missing():
        pytest.skip(f"no SLURM here: {lacks}")
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def opened(folder: Path) -> Sweep:
    sweep = open_run(folder)
    assert isinstance(sweep, Sweep)
    return sweep


def statuses(place: Place, name: str) -> list[str]:
    return opened(place.folder / name).jobs()["status"].to_list()


def must_be_all_shards(place: Place, name: str) -> None:
    """Complete, verified, and together the rows of the single run."""
    assert statuses(place, name) == ["complete"] * 3
    verify = place.runs("verify", name)
    assert verify.wait() == 0, verify.text
    sweep = opened(place.folder / name)
    assert sum(run.manifest.rows for run in sweep.runs.values()) == place.whole.rows
    assert sum(run.manifest.counts["tokens"] for run in sweep.runs.values()) == place.whole.counts["tokens"]


def process_of(folder: Path) -> int | None:
    """The process that captures into a run folder: the one that holds its lock."""
    for process in psutil.process_iter():
        try:
            if any(file.path == str(folder / ".lock") for file in process.open_files()):
                return process.pid
        except psutil.Error:
            continue
    return None


def kill_a_job(place: Place, command: Command, name: str, job: str) -> None:
    """kill -9 once it has committed something."""
    command.until(lambda: place.committed(f"{name}/{job}") > 0)
    process = process_of(place.folder / name / job)
    assert process is not None and process != command.process.pid
    os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("launcher", [JOBLIB, SUBMITIT], ids=["joblib", "submitit_local"])
def test_a_sweep_over_processes(place: Place, launcher: tuple[str, ...]):
    command = place.sweep("sweep", *launcher, *SHARDS)
    assert command.wait() == 0, command.text
    must_be_all_shards(place, "sweep")
    again = place.sweep("sweep", *launcher, *SHARDS)
    assert again.wait() == 0, again.text
    assert again.text.count("skipped") == 3


@pytest.mark.parametrize("launcher", [JOBLIB, SUBMITIT], ids=["joblib", "submitit_local"])
def test_a_job_that_fails_leaves_the_others(place: Place, launcher: tuple[str, ...]):
    command = place.sweep("sweep", *launcher, "sampler.base_rate=20,-1,5")
    assert command.wait() == 1
    assert statuses(place, "sweep") == ["complete", "failed", "complete"]
    assert "Traceback" not in command.text
    assert "1 of 3 jobs are not complete (1 failed); job 1: sampler.base_rate=-1" in command.text.splitlines()[-1]


def test_a_killed_job_leaves_the_others_and_is_gone_on_with(place: Place):
    slow = ("output.checkpoint_every=5", "batch.max_tokens=200")
    command = place.sweep("sweep", *SUBMITIT, *SHARDS, *slow)
    kill_a_job(place, command, "sweep", "1")
    assert command.wait() == 1, command.text
    assert statuses(place, "sweep") == ["complete", "killed", "complete"]
    assert "Traceback" not in command.text
    again = place.sweep("sweep", *SUBMITIT, *SHARDS, *slow)
    assert again.wait() == 0, again.text
    must_be_all_shards(place, "sweep")


def test_a_killed_process_of_joblib_ends_the_pool_and_is_gone_on_with(place: Place):
    slow = ("output.checkpoint_every=5", "batch.max_tokens=200")
    command = place.sweep("sweep", *JOBLIB, *SHARDS, *slow)
    kill_a_job(place, command, "sweep", "0")
    assert command.wait() == 1, command.text
    assert "Traceback" not in command.text
    again = place.sweep("sweep", *JOBLIB, *SHARDS, *slow)
    assert again.wait() == 0, again.text
    must_be_all_shards(place, "sweep")


SLURM = (
    "hydra/launcher=submitit_slurm",
    *(f"hydra.launcher.{option}" for option in ("cpus_per_task=1", "mem_gb=2", "timeout_min=10")),
)


def test_a_slurm_cluster(place: Place, slurm: Slurm):
    command = place.sweep("sweep", *SLURM, *SHARDS)
    assert command.wait() == 0, command.text + slurm.told()
    must_be_all_shards(place, "sweep")


def test_a_cancelled_slurm_job_keeps_its_rows_and_is_gone_on_with(place: Place, slurm: Slurm):
    slow = ("output.checkpoint_every=5", "batch.max_tokens=200")
    command = place.sweep("sweep", *SLURM, *SHARDS, *slow)
    command.until(lambda: place.committed("sweep/0") > 0)
    subprocess.run(["scancel", "--user=root"], check=True, timeout=30)
    command.until(lambda: statuses(place, "sweep")[0] == "interrupted")  # SIGTERM: what it had was written
    # submitit hears of a job's end from sacct, which a cluster without accounting does not have: it would wait on.
    command.kill()
    again = place.sweep("sweep", *SLURM, *SHARDS, *slow)
    assert again.wait() == 0, again.text + slurm.told()
    must_be_all_shards(place, "sweep")
