"""A run that takes some seconds, the rows it should have, and command lines in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sniffer.runs.verify import verify
from sniffer.storage.manifest import Manifest
from tests.tiny_run import overrides, save_checkpoint, save_texts

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {f"doc-{n}": f"the cat number {n} sat on the mat. " * (20 + n * 5 % 37) for n in range(300)}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
"""Float sums depend on the number of threads, so all runs that are compared have one."""


@dataclass
class Command:
    """`python -m sniffer ...` in a process group of its own, its output in a file."""

    arguments: tuple[str, ...]
    output: Path
    module: str = "sniffer"
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.output.parent,
                env=os.environ | ONE_THREAD,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def until(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Waits for something while the process runs."""
        patience = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None and time.monotonic() < patience, self.text
            time.sleep(0.05)


@dataclass(frozen=True)
class Place:
    """Where a test's runs are, and what they capture."""

    folder: Path
    arguments: tuple[str, ...]
    whole: Manifest
    started: list[Command] = field(default_factory=list)

    def start(self, name: str, *more: str) -> Command:
        run = f"hydra.run.dir={self.folder / name}"
        return self._started(Command((*self.arguments, run, *more), self.folder / f"{name}.out"))

    def sweep(self, name: str, *more: str) -> Command:
        again = len(list(self.folder.glob(f"{name}*.out")))
        sweep = ("-m", f"hydra.sweep.dir={self.folder / name}")
        return self._started(Command((*sweep, *self.arguments, *more), self.folder / f"{name}{again}.out"))

    def resume(self, name: str, *more: str) -> Command:
        return self.runs("resume", name, *more)

    def runs(self, verb: str, name: str, *more: str) -> Command:
        """`python -m sniffer.runs VERB RUN`."""
        output = self.folder / f"{name}.{verb}.out"
        return self._started(Command((verb, str(self.folder / name), *more), output, "sniffer.runs"))

    def _started(self, command: Command) -> Command:
        self.started.append(command)
        return command

    def log(self, name: str) -> str:
        path = self.folder / name / "sniffer.log"
        return path.read_text() if path.exists() else ""

    def workers(self, name: str) -> list[int]:
        """Processes of the workers that had their model, in that order."""
        return [int(process) for process in re.findall(r"is ready: process (\d+)", self.log(name))]

    def committed(self, name: str) -> int:
        """Documents that count so far."""
        path = self.folder / name / "manifest.json"
        return Manifest.load(path.parent).counts["examples"] if path.exists() else 0

    def must_be_whole(self, name: str) -> Manifest:
        """Complete, verified, and with the rows of the run in one process."""
        manifest, problems = verify(self.folder / name)
        assert problems == []
        assert (manifest.status, manifest.digest) == ("complete", self.whole.digest)
        assert manifest.counts == self.whole.counts
        return manifest


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Manifest]:
    """The command line, and the run of one process."""
    place = tmp_path_factory.mktemp("whole")
    checkpoint, texts = save_checkpoint(place / "checkpoint"), save_texts(place / "texts.jsonl", TEXTS)
    arguments = (*overrides(checkpoint, texts, "sampler.base_rate=20", "batch.max_tokens=1000"),)
    command = Command((*arguments, f"hydra.run.dir={place / 'run'}"), place / "out")
    assert command.wait() == 0, command.text
    return arguments, Manifest.load(place / "run")


@pytest.fixture
def place(tmp_path: Path, reference: tuple[tuple[str, ...], Manifest]) -> Iterator[Place]:
    place = Place(tmp_path, *reference)
    yield place
    for command in place.started:
        command.kill()
