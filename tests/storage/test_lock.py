"""A folder has one writer, and is free again when that one is gone, however it went."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sniffer.errors import RunError
from sniffer.storage.layout import RunFolder
from sniffer.storage.lock import hold, is_held
from tests.helpers_disk import Disk, failing

HOLDER = """
import sys, time
from pathlib import Path
from sniffer.storage.lock import hold

with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_held_folder_is_refused_in_one_line(tmp_path: Path):
    assert not is_held(tmp_path)
    with hold(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(RunError, match="another process") as caught, hold(tmp_path):
            pass
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    with hold(tmp_path):
        pass


def test_looking_neither_takes_the_lock_nor_leaves_a_file(tmp_path: Path):
    assert not is_held(tmp_path)
    assert not (tmp_path / RunFolder.LOCK).exists()


def test_an_exception_lets_go(tmp_path: Path):
    with pytest.raises(ValueError), hold(tmp_path):
        raise ValueError
    assert not is_held(tmp_path)


def test_a_lock_that_fails_is_one_line(tmp_path: Path):
    with (
        failing(Disk(tmp_path, 1, only=("flock",))),
        pytest.raises(RunError, match="Input/output error"),
        hold(tmp_path),
    ):
        pass
    with hold(tmp_path):
        pass


def test_a_killed_holder_lets_go(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        assert is_held(tmp_path)
        holder.kill()
        holder.wait()
    assert not is_held(tmp_path)
