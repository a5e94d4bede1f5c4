"""A small run to hit, the rows it should have in the end, and a count of what was survived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sniffer.storage.manifest import Manifest
from tests.faults.driver import NO_FAULT, Command, Fault, runs, sniff
from tests.tiny_run import overrides, save_checkpoint, save_texts

TEXTS = {
    f"doc-{n}": f"the cat number {n} sat on the mat and looked at the moon. " * (2 + n * 7 % 11) for n in range(24)
}


@dataclass(frozen=True)
class Whole:
    """The run that nothing happened to: its command line, its digest, and how long it captured."""

    arguments: tuple[str, ...]
    manifest: Manifest
    seconds: float


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    place = tmp_path_factory.mktemp("whole")
    arguments = overrides(
        save_checkpoint(place / "checkpoint"),
        save_texts(place / "texts.jsonl", TEXTS),
        "sampler.base_rate=20",
        "batch.max_tokens=400",
        "output.checkpoint_every=4",
        "capture.kinds=[q,k,q_pre]",
    )
    command = sniff(place / "log", *arguments, f"hydra.run.dir={place / 'run'}")
    assert command.wait() == 0, command.text
    manifest = Manifest.load(place / "run")
    assert manifest.rows > 1000 and len({part.commit for part in manifest.parts}) > 3
    seconds = manifest.timings
    return Whole(arguments, manifest, seconds["inference"] + seconds["commit"] + seconds["write"])


@dataclass
class Patient:
    """A run that something happens to."""

    folder: Path
    whole: Whole
    attempts: int = 0

    def start(self, *more: str, fault: Fault = NO_FAULT) -> Command:
        log = self.folder.with_suffix(".log")
        return sniff(log, *self.whole.arguments, f"hydra.run.dir={self.folder}", *more, fault=fault)

    def verb(self, *arguments: str, fault: Fault = NO_FAULT) -> Command:
        self.attempts += 1
        log = self.folder.with_suffix(f".{self.attempts}.log")
        return runs(log, arguments[0], str(self.folder), *arguments[1:], fault=fault)

    def must_recover(self, *options: str) -> None:
        """Resume and verify end in the rows of the uninterrupted run."""
        resume = self.verb("resume", *options)
        assert resume.wait() == 0, resume.text
        verify = self.verb("verify")
        assert verify.wait() == 0, verify.text
        manifest = Manifest.load(self.folder)
        assert (manifest.status, manifest.digest) == ("complete", self.whole.manifest.digest)
        assert manifest.counts == self.whole.manifest.counts


@pytest.fixture
def patient(tmp_path: Path, whole: Whole) -> Patient:
    return Patient(tmp_path / "run", whole)


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Counts one fault of a kind as survived."""
    return lambda kind: record_property("survived", kind)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    counts = Counter(kind for report in passed for name, kind in report.user_properties if name == "survived")
    if counts:
        terminalreporter.section("faults survived: rows identical after resume, and verified")
        for kind, count in sorted(counts.items()):
            terminalreporter.line(f"{count:4}  {kind}")
        terminalreporter.line(f"{counts.total():4}  in all")
