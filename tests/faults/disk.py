"""A disk that fails at one system call, or at all from one on: no row is lost, and none is there twice.

The calls of each kind of run are failed in turn: each of one kind's, every fifth or tenth of others' (STEP). Most of
it goes through the real store and loop without a model, some through whole runs in this process, by one model or a crew
of workers, and some through the command line.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from sniffer import capture
from sniffer.config.resolve import conf_folder, register, resolve
from sniffer.config.schema import Config
from sniffer.config.trust import Trust
from sniffer.engine.model_cache import LastModel
from sniffer.errors import SnifferError
from sniffer.runs.resume import resume
from sniffer.runs.verify import verify
from sniffer.storage.manifest import Manifest
from tests import helpers_store
from tests.engine.test_crew import OneEngine, well
from tests.faults.conftest import Patient
from tests.faults.driver import Fault
from tests.helpers_config import save_config
from tests.helpers_disk import READING, WRITING, Disk, failing
from tests.helpers_runs import LAW, save_place
from tests.helpers_store import OUTPUTS, Outputs, Session, killed, must_survive, n_calls, prepared, repeat, whole_digest
from tests.test_generation import examples
from tests.test_moments import assert_equal_moments, opened
from tests.tiny_run import overrides

Survived = Callable[[str], None]

ANY = WRITING + READING
STEP = 1 if os.environ.get("EVERY_CALL") else 5
"""Of the calls of most kinds of runs every fifth is failed, so that it takes minutes; EVERY_CALL=1 fails each. It is
no multiple of three, for every third call has another error."""
SHARES = 4
"""Of the calls of one kind of run, each a test, so that two processes have about the same to do."""
MODEL = LastModel()


def sweep(
    folder: Path, session: Session, whole: str, share: int, begun: Path | None = None, every: int = 1, **options: Any
) -> Iterator[Disk]:
    """Fails each of a share of a session's calls; yields the disk of each that was survived."""
    only, shares = options.pop("only", ANY), options.pop("shares", SHARES)
    for at in range(1 + share * every, 1 + n_calls(folder, session, only, begun), shares * every):
        error = errno.ENOSPC if at % 3 == 0 else errno.EIO
        disk = Disk(folder, at, error=error, only=only, **options)
        must_survive(folder, session, disk, whole, begun)
        yield disk


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return whole_digest(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_a_call_that_fails_once(tmp_path: Path, digest: str, outputs: str, share: int, survived: Survived):
    """Reading is the same in all kinds of runs."""
    session = partial(helpers_store.resume, outputs=OUTPUTS[outputs])
    only = ANY if outputs == "checkpoints" else WRITING
    # What is written beside a GPU is written by the same calls: fewer of them will do.
    every = 1 if outputs == "checkpoints" else 2 * STEP if OUTPUTS[outputs].gpu else STEP
    for _ in sweep(tmp_path / "run", session, digest, share, every=every, only=only):
        survived("a system call that fails once")


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_a_disk_that_takes_no_more(tmp_path: Path, digest: str, outputs: str, share: int, survived: Survived):
    session, every = partial(helpers_store.resume, outputs=OUTPUTS[outputs]), 8 if OUTPUTS[outputs].gpu else 5
    for _ in sweep(tmp_path / "run", session, digest, share, every=every, only=WRITING, lasting=True):
        survived("a disk that takes no more from a moment on")


def finish(place: Path, outputs: Outputs) -> Path:
    helpers_store.run(prepared(place, None), outputs)
    return place


BEGUN: dict[str, Callable[[Path], Any]] = {
    "killed between commits": lambda place: killed(place, OUTPUTS["checkpoints"], 5),
    "killed with pending parts": lambda place: killed(place, OUTPUTS["pending to the end"], 4),
    "with rows that are there twice": lambda place: repeat(finish(place, OUTPUTS["checkpoints"]), 1),
}


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("what", BEGUN)
def test_a_call_that_fails_once_in_a_resumed_run(
    tmp_path: Path, digest: str, what: str, share: int, survived: Survived
):
    begun = tmp_path / "begun"
    BEGUN[what](begun)
    session = partial(helpers_store.resume, outputs=OUTPUTS["spills"])
    every = STEP if what == "killed between commits" else 2 * STEP
    for _ in sweep(tmp_path / "run", session, digest, share, begun, every):
        survived("a system call that fails once while a run is resumed")


@pytest.mark.parametrize("seed", range(4))
def test_one_failure_after_the_other(tmp_path: Path, digest: str, seed: int, survived: Survived):
    """Session after session, each with a call that fails, until one ends before its call has come."""
    chance, folder = random.Random(seed), tmp_path / "run"
    for _ in range(12):
        prepared(folder, None)
        for _ in range(4):
            outputs = OUTPUTS[chance.choice(list(OUTPUTS))]
            disk = Disk(folder, chance.randrange(1, 250), chance.random() < 0.3, chance.choice([5, 28]), WRITING)
            with failing(disk):
                try:
                    helpers_store.resume(folder, outputs)
                except SnifferError:
                    continue
            break
        with failing(Disk(folder)):
            helpers_store.resume(folder, OUTPUTS["plain"])
        manifest, problems = verify(folder)
        assert (problems, manifest.digest) == ([], digest)
        survived("several sessions, each with a call that fails")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_place(tmp_path_factory.mktemp("runs"))


def configured(place: Path, *more: str) -> tuple[Any, Config]:
    register()
    few = ("capture.layers=[0]", *LAW, *more)
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("config", overrides(place / "checkpoint", place / "texts.jsonl", *few))
    return cfg, resolve(cfg)


def whole_session(place: Path, *more: str) -> Session:
    """Of real runs: as the command line, once Hydra has composed the configuration."""
    cfg, config = configured(place, *more)

    def session(folder: Path) -> None:
        if "config.yaml" in os.listdir(folder):  # which is none of the calls that count
            resume(folder, Trust(), load=MODEL.load)
        else:
            save_config(folder, cfg)
            capture.run(config, folder, load=MODEL.load)

    return session


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    folder = place / "finished"
    whole_session(place, "output.checkpoint_every=6")(prepared(folder, None))
    return folder


@pytest.mark.parametrize("share", range(SHARES))
def test_a_call_that_fails_once_in_a_whole_run(tmp_path: Path, place: Path, finished: Path, share: int, survived):
    session, digest = whole_session(place, "output.checkpoint_every=6"), Manifest.load(finished).digest
    for _ in sweep(tmp_path / "run", session, digest, share, every=STEP):
        survived("a system call that fails once in a whole run")


SMALL = ("dataset.max_examples=5", "dataset.max_tokens=64", "batch.max_tokens=130")
CHECKPOINTS, SPILLS = "output.checkpoint_every=2", "output.memory_limit=4kB"
GREEDY = ("generate=greedy", "generate.max_new_tokens=4")
MOMENTS = "capture.moments.kinds=[q,k]"
MORE = {
    "generation": (*GREEDY, CHECKPOINTS),
    "generation that spills": (*GREEDY, SPILLS),
    "moments": (MOMENTS, CHECKPOINTS),
    "moments that spill": (MOMENTS, SPILLS),
    "statistics of attention": ("capture.attention=all", CHECKPOINTS),
    "all of it": (*GREEDY, "generate.live=both", MOMENTS, "capture.attention=all", CHECKPOINTS),
}
"""What runs may have beside vectors, in commits of two documents or, spilled, of more."""
STRIDE = 1 if os.environ.get("EVERY_CALL") else 23


@pytest.fixture(scope="module", params=MORE)
def more(request: pytest.FixtureRequest, place: Path) -> tuple[Session, Path]:
    """A kind of run, and the folder of one that nothing happened to."""
    session = whole_session(place, *SMALL, *MORE[request.param])
    session(folder := prepared(place / request.param, None))
    assert len({part.commit for part in Manifest.load(folder).parts}) > 1
    return session, folder


def must_be_alike(folder: Path, whole: Path) -> None:
    """Also in what no digest tells: the text that was generated, and what all positions sum up to."""
    one, other = opened(whole), opened(folder)
    if one.manifest.generation is not None:
        assert examples(folder) == examples(whole)
    if one.manifest.moments is not None:
        assert_equal_moments(one, other)


def lost_its_disk(folder: Path, session: Session) -> Path:
    """A run that had committed something when its disk took no more."""
    at = n_calls(folder, session, WRITING) * 2 // 3
    with failing(Disk(prepared(folder, None), at, only=WRITING, lasting=True)), pytest.raises(SnifferError):
        session(folder)
    assert Manifest.load(folder).parts
    return folder


@pytest.mark.parametrize("share", range(2))
@pytest.mark.parametrize("state", ["new", "resumed"])
def test_a_call_that_fails_once_in_a_run_with_more(tmp_path: Path, more, state: str, share: int, survived: Survived):
    """Reading is what it is in a whole run without."""
    session, whole = more
    begun = None if state == "new" else lost_its_disk(tmp_path / "begun", session)
    where = tmp_path / "run", session, Manifest.load(whole).digest, share, begun
    for _ in sweep(*where, every=STRIDE, shares=2, only=WRITING):
        must_be_alike(tmp_path / "run", whole)
        survived("a system call that fails once in a run with generation, moments or attention")


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("what", ["complete", "damaged"])
def test_a_call_that_fails_once_while_a_run_is_mended(
    tmp_path: Path, place: Path, finished: Path, what: str, share: int, survived: Survived
):
    begun, session = prepared(tmp_path / "begun", finished), whole_session(place, "output.checkpoint_every=6")
    manifest = Manifest.load(begun)
    (begun / "captures/layer=00/kind=q/part-00009.parquet").write_bytes(b"left over")
    (begun / ".examples.parquet").write_bytes(b"damaged")
    if what == "damaged":
        (begun / manifest.parts[-1].path).write_bytes(b"damaged")
    # What such a folder is worth before it is mended, verify says.
    only = tuple(call for call in ANY if call != "stat")
    for at in range(1 + share * STEP, 1 + n_calls(tmp_path / "run", session, only, begun), SHARES * STEP):
        folder = prepared(tmp_path / "run", begun)
        with failing(Disk(folder, at, only=only)):
            try:
                session(folder)
            except (SnifferError, OSError) as error:
                assert "\n" not in str(error)
        session(folder)
        found, problems = verify(folder)
        assert (problems, found.status, found.digest) == ([], "complete", manifest.digest), at
        survived("a system call that fails once while a run is mended")


@pytest.mark.parametrize("share", range(SHARES))
def test_a_call_that_fails_once_in_a_run_by_a_crew(
    tmp_path: Path, place: Path, finished: Path, share: int, survived, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(capture, "engine_for", lambda *_: OneEngine(well, size=2))
    session, digest = whole_session(place, "output.checkpoint_every=4"), Manifest.load(finished).digest
    for _ in sweep(tmp_path / "run", session, digest, share, every=2 * STEP):
        survived("a system call that fails once in a run by a crew")


@pytest.fixture(scope="module")
def calls_of_the_command_line(tmp_path_factory: pytest.TempPathFactory, whole: Any) -> list[str]:
    patient = Patient(tmp_path_factory.mktemp("calls") / "run", whole)
    noted = patient.folder.with_name("calls")
    command = patient.start(fault=Fault(disk=Disk(patient.folder, only=ANY), calls=noted))
    assert command.wait() == 0, command.text
    return noted.read_text().splitlines()


N_COMMANDS = 16


@pytest.mark.parametrize("number", range(N_COMMANDS))
def test_a_call_that_fails_once_under_the_command_line(
    patient: Patient, calls_of_the_command_line: list[str], number: int, survived: Survived
):
    at = 1 + number * len(calls_of_the_command_line) // N_COMMANDS
    command = patient.start(fault=Fault(disk=Disk(patient.folder, at, only=ANY)))
    code = command.wait()
    assert "Traceback" not in command.text
    if (patient.folder / "manifest.json").exists():
        assert patient.verb("verify").wait() == 0
        assert Manifest.load(patient.folder).status == ("interrupted" if code else "complete"), command.text
    if not (patient.folder / "config.yaml").exists():
        shutil.rmtree(patient.folder, ignore_errors=True)
        assert code == 1 and patient.start().wait() == 0
    patient.must_recover()
    survived("a system call that fails once under the command line")
