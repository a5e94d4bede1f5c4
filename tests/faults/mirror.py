"""What befalls a mirror befalls neither the run nor what was there: a real S3 server that goes, lags and refuses."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sniffer.runs.mirror import mirror
from sniffer.runs.verify import verify
from sniffer.storage.away import away
from sniffer.storage.manifest import Manifest
from sniffer.storage.remote import folder_at
from tests.faults.conftest import Patient
from tests.faults.driver import Command, Fault
from tests.helpers_remote import CUT, HALF, Server, files_at, s3

Survived = Callable[[str], None]


@pytest.fixture(scope="module")
def listening() -> Iterator[Server]:
    with s3() as server:
        yield server


@pytest.fixture
def server(listening: Server) -> Iterator[Server]:
    yield listening
    listening.trouble = lambda method, path: None


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}"


def started(patient: Patient, server: Server, url: str, **more: str) -> Command:
    environment = {**server.environment, **more}
    return patient.start(
        f"output.mirror={url}", "output.checkpoint_every=8", fault=Fault(environment=tuple(environment.items()))
    )


ALONE = "output.keep_local=false"


def started_alone(patient: Patient, server: Server, url: str) -> Command:
    """Of which the rows stay at the mirror alone."""
    fault = Fault(environment=tuple(server.environment.items()))
    return patient.start(f"output.mirror={url}", ALONE, fault=fault)


def must_have_every_row(url: str, patient: Patient, server: Server) -> None:
    """Each part that counts is here, or there for sure; and going on ends in the rows of a run that was left alone."""
    server.trouble = lambda method, path: None
    here, there = Manifest.load(patient.folder, parts_must_exist=False), must_be_a_run(url, patient, cut_off=True)
    named = {} if there is None else {part.path: part.sha256 for part in there.parts}
    assert all(named[part.path] == part.sha256 for part in away(patient.folder, here))
    resume = patient.verb("resume", "--mirror", url, fault=Fault(environment=tuple(server.environment.items())))
    assert resume.wait() == 0, resume.text
    there, here = must_be_a_run(url, patient), Manifest.load(patient.folder, parts_must_exist=False)
    assert there is not None and (there.status, there.digest) == ("complete", patient.whole.manifest.digest)
    assert there == here and there.counts == patient.whole.manifest.counts
    assert len(away(patient.folder, here)) == len(here.parts) > 1


def must_be_a_run(url: str, patient: Patient, *, cut_off: bool = False) -> Manifest | None:
    """What is there is whole, and no more than the run; None where there is nothing yet.

    Where the copying was `cut_off`, a twin of a small file may be a step behind.
    """
    if "manifest.json" not in files_at(url):
        return None
    there, problems = verify(folder_at(url))
    here = Manifest.load(patient.folder, parts_must_exist=False)
    assert [problem for problem in problems if not (cut_off and "; resume writes it again" in problem)] == []
    assert {part.path: part.sha256 for part in there.parts}.items() <= {
        part.path: part.sha256 for part in here.parts
    }.items()
    return there


def must_catch_up(url: str, patient: Patient, server: Server) -> None:
    server.trouble = lambda method, path: None
    mirror(patient.folder, url)
    there = must_be_a_run(url, patient)
    assert there is not None and (there.status, there.digest) == ("complete", patient.whole.manifest.digest)


def test_the_server_goes_away(patient: Patient, server: Server, url: str, survived: Survived):
    count = itertools.count()
    server.trouble = lambda method, path: CUT if next(count) > 60 else None
    command = started(patient, server, url)
    assert command.wait() == 0, command.text
    assert (
        f"{url} lags behind the run" in command.text and f"sniffer.runs mirror {patient.folder} {url}" in command.text
    )
    assert command.text.count("cannot be written to") == 1
    assert Manifest.load(patient.folder).digest == patient.whole.manifest.digest
    server.trouble = lambda method, path: None
    there = must_be_a_run(url, patient)
    assert there is None or there.rows < patient.whole.manifest.rows
    must_catch_up(url, patient, server)
    survived("a mirror whose server goes away")


def test_the_server_comes_and_goes_and_takes_half(patient: Patient, server: Server, url: str, survived: Survived):
    count = itertools.count()

    def trouble(method: str, path: str) -> str | None:
        number = next(count)
        return CUT if number % 60 > 30 else HALF if method == "PUT" and "part-" in path and number % 3 else None

    server.trouble = trouble
    assert started(patient, server, url).wait() == 0
    server.trouble = lambda method, path: None
    must_be_a_run(url, patient)
    must_catch_up(url, patient, server)
    survived("a mirror whose server comes and goes, and takes half of what it is sent")


def test_a_slow_server(patient: Patient, server: Server, url: str, survived: Survived):
    """The run is complete long before its copy is, and waits for it."""
    at: dict[str, float] = {}

    def trouble(method: str, path: str) -> float:
        at.setdefault(path, time.time())
        return 0.01

    server.trouble = trouble
    command = started(patient, server, url)
    assert command.wait() == 0 and f"{url} has all of it" in command.text, command.text
    there = must_be_a_run(url, patient)
    assert there is not None and there.digest == patient.whole.manifest.digest and there.status == "complete"
    last = max(seen for path, seen in at.items() if "part-" in path)
    assert (patient.folder / "examples.parquet").stat().st_mtime < last
    survived("a mirror on a slow server")


def test_kill_while_it_is_sent(patient: Patient, server: Server, url: str, survived: Survived):
    server.trouble = lambda method, path: 0.02 if method == "PUT" else None
    command = started(patient, server, url)
    command.wait_for(patient.folder / "manifest.json")
    time.sleep(0.6 * patient.whole.seconds)
    command.send(signal.SIGKILL)
    assert command.wait() in (-signal.SIGKILL, 0)
    server.trouble = lambda method, path: None
    must_be_a_run(url, patient, cut_off=True)
    resume = patient.verb("resume", "--mirror", url, fault=Fault(environment=tuple(server.environment.items())))
    assert resume.wait() == 0, resume.text
    must_catch_up(url, patient, server)
    survived("kill -9 while a mirror is sent")


def test_terminate_while_it_is_sent(patient: Patient, server: Server, url: str, survived: Survived):
    command = started(patient, server, url)
    command.wait_for(patient.folder / "captures/layer=01/kind=q/part-00001.parquet")
    command.send(signal.SIGTERM)
    assert command.wait() == 143 and f"--mirror {url}" in command.text, command.text
    there = must_be_a_run(url, patient)
    assert there is not None and there == Manifest.load(patient.folder) and there.status == "interrupted"
    survived("SIGTERM while a mirror is sent")


def test_missing_credentials_are_told_before_the_run(patient: Patient, server: Server, url: str, survived: Survived):
    none = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    command = started(patient, server, url, **none)
    assert command.wait() == 1
    (line,) = [line for line in command.text.splitlines() if "output.mirror" in line]
    assert f"output.mirror={url} cannot be written to (" in line and "Traceback" not in command.text
    assert not patient.folder.exists()
    survived("a mirror without credentials")


@pytest.mark.parametrize("moment", range(8))
def test_kill_while_parts_leave(patient: Patient, server: Server, url: str, survived: Survived, moment: int):
    """At so many requests of the mirror, whichever of sending, proving and removing that is."""
    at, count = 25 + 23 * moment, itertools.count()
    reached = threading.Event()

    def trouble(method: str, path: str) -> None:
        if next(count) == at:
            reached.set()

    server.trouble = trouble
    command = started_alone(patient, server, url)
    while not reached.wait(0.001) and command.alive:
        pass
    command.send(signal.SIGKILL)
    assert command.wait() in (-signal.SIGKILL, 0)
    must_have_every_row(url, patient, server)
    survived("kill -9 while parts leave for the mirror")


def test_kill_just_before_a_part_leaves(patient: Patient, server: Server, url: str, survived: Survived):
    environment = tuple(server.environment.items())
    words = f"output.mirror={url}", ALONE
    command = patient.start(*words, fault=Fault(environment=environment, kill_at_removal=5))
    assert command.wait() == -signal.SIGKILL
    assert len(away(patient.folder, Manifest.load(patient.folder, parts_must_exist=False))) == 4
    must_have_every_row(url, patient, server)
    survived("kill -9 just before a part leaves")


def test_the_server_goes_away_with_parts_there_alone(patient: Patient, server: Server, url: str, survived: Survived):
    count = itertools.count()
    server.trouble = lambda method, path: CUT if next(count) > 90 else None
    command = started_alone(patient, server, url)
    assert command.wait() == 0 and f"{url} lags behind the run" in command.text, command.text
    manifest = Manifest.load(patient.folder, parts_must_exist=False)
    assert manifest.digest == patient.whole.manifest.digest and away(patient.folder, manifest)
    assert len(away(patient.folder, manifest)) < len(manifest.parts)
    server.trouble = lambda method, path: None
    must_be_a_run(url, patient)
    mirror(patient.folder, url)
    there = must_be_a_run(url, patient)
    assert there == manifest and len(away(patient.folder, manifest)) == len(manifest.parts)
    survived("a server that goes away, with parts there alone")


def test_half_an_upload_keeps_the_part_here(patient: Patient, server: Server, url: str, survived: Survived):
    server.trouble = lambda method, path: HALF if method == "PUT" and "layer=01" in path else None
    command = started_alone(patient, server, url)
    assert command.wait() == 0 and "arrived as something else" in command.text, command.text
    manifest = Manifest.load(patient.folder, parts_must_exist=False)
    assert not [part for part in away(patient.folder, manifest) if part.layer == 1]
    server.trouble = lambda method, path: None
    mirror(patient.folder, url)
    there = must_be_a_run(url, patient)
    assert there == manifest and there.digest == patient.whole.manifest.digest
    assert len(away(patient.folder, manifest)) == len(manifest.parts)
    survived("half an upload, with parts to leave")
