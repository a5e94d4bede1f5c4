"""A command ends with an exit code, and an error that is meant for a person is one line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sniffer.errors import RunError
from sniffer.process.stop import Stopped
from sniffer.terminal.command import exit_code, output_is_lost, refusal


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> NoReturn:
        raise error

    return command


ERRORS = [
    (RunError("no run: name one"), "no run: name one"),
    (HydraException("not\n  composed"), "not, composed"),
    (OmegaConfBaseException("no key"), "no key"),
    (YAMLError("no YAML"), "no YAML"),
    (OSError(28, "No space left on device", "x"), "x: No space left on device"),
]


@pytest.mark.parametrize(("error", "said"), ERRORS)
def test_what_a_person_can_mend_is_one_line(error: Exception, said: str, capsys: pytest.CaptureFixture):
    streams = sys.stdout, sys.stderr
    assert exit_code(raising(error)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(said) and len(err.splitlines()) == 1
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize(("error", "_"), ERRORS)
def test_its_traceback_can_be_asked_for(error: Exception, _: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(type(error)):
        exit_code(raising(error))


def test_what_nobody_foresaw_keeps_its_traceback_unless_a_command_has_words_for_it(capsys: pytest.CaptureFixture):
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()))
    assert exit_code(raising(ZeroDivisionError()), lambda error: refusal(error) or "too few") == 1
    assert capsys.readouterr().err == "too few\n"


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (Stopped(signal.SIGINT), 130), (Stopped(signal.SIGTERM), 143)]
)
def test_a_signal_is_told_by_the_code(error: BaseException, code: int, capsys: pytest.CaptureFixture):
    assert exit_code(raising(error)) == code
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_may_say_itself_that_its_output_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def command() -> int:
        print("something")
        return int(output_is_lost())

    assert exit_code(command) == 0
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert exit_code(command) == 1
    assert "No space left on device" in capsys.readouterr().err
