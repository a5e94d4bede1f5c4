"""A command does what it does whoever listens: output that is full, closed, or no longer read costs at most a line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from sniffer.__main__ import main
from sniffer.runs import __main__ as verbs
from sniffer.runs.verify import verify
from sniffer.terminal.streams import is_lost, standard_streams
from tests.helpers_storage import make_run
from tests.tiny_run import overrides

REPOSITORY = Path(__file__).parents[2]
LOST = "standard output could not be written: No space left on device"
HELP = [
    ["sniffer", "--help"],
    ["sniffer", "--cfg", "job"],
    ["sniffer.runs", "--help"],
    ["sniffer.experiments", "--help"],
    ["sniffer.experiments", "key_rank", "--help"],
]


@pytest.fixture
def nobody() -> Iterator[int]:
    """The writing end of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture
def full() -> Iterator[int]:
    with Path("/dev/full").open("w") as file:
        yield file.fileno()


def command(words: list[str], stdout: Any) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_ends_quietly_when_its_reader_has_gone(words: list[str], nobody: int):
    assert command(words, nobody) == (0, "")


@pytest.mark.parametrize("verb", ["list", "inspect", "verify"])
def test_a_verb_ends_quietly_when_its_reader_has_gone_and_says_so_when_the_disk_is_full(
    tmp_path: Path,
    nobody: int,
    full: int,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    folder = make_run(tmp_path / "run").folder
    found = int(verb == "verify")  # make_run leaves no rerun.yaml
    for number, code, told in ((nobody, found, ""), (full, 1, f"{LOST}\n")):
        with monkeypatch.context() as patched, os.fdopen(number, "w", closefd=False) as stream:
            patched.setattr(sys, "stdout", stream)
            assert verbs.main([verb, str(folder)]) == code
        assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize("where", ["nobody", "full", "closed"])
def test_a_complete_run_is_complete_whoever_listens(
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    where: str,
):
    folder = tmp_path / "run"
    stream = None if where == "closed" else os.fdopen(request.getfixturevalue(where), "w", closefd=False)
    handlers, level = logging.root.handlers[:], logging.root.level
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        patched.setattr(sys, "argv", ["sniffer", *overrides(checkpoint, texts, f"hydra.run.dir={folder}")])
        try:
            code = main()
        finally:
            logging.root.handlers[:], logging.root.level = handlers, level
            GlobalHydra.instance().clear()
    assert code == 0
    manifest, problems = verify(folder)
    assert manifest.status == "complete" and problems == []


def test_what_is_written_arrives_and_the_streams_are_given_back(capsys: pytest.CaptureFixture):
    before = sys.stdout, sys.stderr
    with standard_streams() as output:
        print("heard")
        sys.stdout.writelines(["one\n", "two\n"])
        assert sys.stdout.isatty() is before[0].isatty()
    assert (sys.stdout, sys.stderr) == before
    assert not is_lost(output)
    assert capsys.readouterr() == ("heard\none\ntwo\n", "")


def test_closed_streams_do_not_lend_their_numbers_to_files(tmp_path: Path):
    """Of a process that begins without them, the first file to be opened would get what is printed."""
    code = (
        "import os, sys\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "sys.stdin = sys.stdout = sys.stderr = None\n"
        "from sniffer.terminal.streams import standard_streams\n"
        "with standard_streams(), open('data', 'w') as file:\n"
        "    print('printed')\n"
        "    os.system('echo printed')\n"
        "    file.write(str(file.fileno()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False).returncode == 0
    assert int((tmp_path / "data").read_text()) > 2
