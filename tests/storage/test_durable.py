from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from sniffer.errors import CaptureError
from sniffer.storage.durable import durable_file


def test_appears_whole_with_its_size_and_hash(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "file"
    with durable_file(path) as file:
        file.write(b"one ")
        file.write(b"two")
        assert not path.exists()
    assert path.read_bytes() == b"one two"
    assert (file.bytes, file.sha256) == (7, hashlib.sha256(b"one two").hexdigest())
    assert list(path.parent.iterdir()) == [path]


def test_replaces_what_was_there_only_at_the_end(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with durable_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, stop: type[BaseException]):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(stop), durable_file(path) as file:
        file.write(b"half")
        raise stop
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "old")]


def test_disk_full_is_one_line_that_names_path_and_space(tmp_path: Path):
    path = tmp_path / "captures" / "part"
    with pytest.raises(CaptureError) as caught, durable_file(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    message = str(caught.value)
    assert str(path) in message
    assert "No space left on device" in message
    assert "MB free" in message
    assert "\n" not in message
    assert list(path.parent.iterdir()) == []


def test_a_file_in_the_way_of_a_folder(tmp_path: Path):
    (tmp_path / "captures").write_text("not a folder")
    with pytest.raises(CaptureError, match="captures"), durable_file(tmp_path / "captures" / "part"):
        pass
