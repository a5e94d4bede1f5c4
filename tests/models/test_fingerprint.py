"""Files are known whole; a large one is read once, and again as soon as anything about it has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from sniffer.models import fingerprint

from sniffer.errors import CheckpointError
from sniffer.storage.same_run import differences


@pytest.fixture(autouse=True)
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are read whole. Files of 100 bytes are large here, and settle at once."""
    monkeypatch.setenv("SNIFFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "LARGE", 100)
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -(10**12))
    seen: list[str] = []
    honest = fingerprint._sha256

    def sha256(path: Path) -> str:
        seen.append(path.name)
        return honest(path)

    monkeypatch.setattr(fingerprint, "_sha256", sha256)
    return seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(5000))
    return folder


def whole(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_every_byte_counts(folder: Path):
    assert fingerprint.digests(folder) == {path.name: whole(path) for path in folder.iterdir()}


def test_a_very_large_file_is_told_as_before_and_whole(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fingerprint, "EARLIER_BYTES", 4000)
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(2 << 20))
    first = fingerprint.digests(folder)["model.safetensors"]
    early = f"{2 << 20} bytes, first MiB sha256:{hashlib.sha256(bytes(1 << 20)).hexdigest()}"
    assert first == f"{early}, {whole(weights)}"
    with weights.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    second = fingerprint.digests(folder)["model.safetensors"]
    assert second.startswith(early) and second != first

    def manifest(value: str) -> dict:
        return {"model": {"files": {"model.safetensors": value}}}

    (line,) = differences(manifest(first), manifest(second))
    then, now = line.removeprefix("model.files.model.safetensors: ").split(", ")
    assert then != now.replace(" now", " then")  # what is shown is where they differ
    for told in (first, second):  # as far as an early manifest tells, both are the same
        assert not differences(manifest(early), manifest(told)) and not differences(manifest(told), manifest(early))
    assert differences(manifest(early.replace("bytes", "bytes more")), manifest(first))


def test_a_large_file_is_read_once(folder: Path, reads: list[str]):
    first = fingerprint.digests(folder)
    fingerprint.begin(folder)
    assert fingerprint.digests(folder) == first
    assert reads.count("model.safetensors") == 1 and reads.count("config.json") == 2


def test_reading_may_begin_early(folder: Path, reads: list[str]):
    fingerprint.begin(folder)
    assert fingerprint.digests(folder)["model.safetensors"] == whole(folder / "model.safetensors")
    assert reads.count("model.safetensors") == 1


def rewrite(path: Path) -> None:
    path.write_bytes(b"x" * 5000)


def rewrite_and_set_the_time_back(path: Path) -> None:
    facts = path.stat()
    rewrite(path)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def replace_by_another(path: Path) -> None:
    other = path.with_name(".other")
    other.write_bytes(b"y" * 5000)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, rewrite_and_set_the_time_back, replace_by_another])
def test_a_changed_file_is_read_again(folder: Path, change, reads: list[str]):
    before = fingerprint.digests(folder)
    change(folder / "model.safetensors")
    after = fingerprint.digests(folder)
    assert after["model.safetensors"] == whole(folder / "model.safetensors") != before["model.safetensors"]


def test_a_file_that_changes_while_it_is_read_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    honest, weights = fingerprint._sha256, folder / "model.safetensors"

    def slow(path: Path) -> str:
        digest = honest(path)
        if path == weights and weights.read_bytes()[0] == 0:
            rewrite(weights)
        return digest

    monkeypatch.setattr(fingerprint, "_sha256", slow)
    assert fingerprint.digests(folder)["model.safetensors"] == whole(weights)


def test_what_has_just_changed_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]):
    monkeypatch.setattr(fingerprint, "SETTLED_NS", 10**12)
    for _ in range(2):
        fingerprint.digests(folder)
    assert reads.count("model.safetensors") == 2


def test_without_a_cache_folder_it_only_takes_longer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SNIFFER_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert fingerprint.digests(folder)["model.safetensors"] == whole(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_cannot_be_read_is_named(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    honest = fingerprint._sha256

    def broken(path: Path) -> str:
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return honest(path)

    monkeypatch.setattr(fingerprint, "_sha256", broken)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: Permission denied"):
        fingerprint.digests(folder)


def test_of_a_gguf_file_only_that_and_an_adapter_count(folder: Path):
    for name in ("a.gguf", "b.gguf", "adapter_config.json"):
        (folder / name).write_text(name)
    assert set(fingerprint.digests(folder, "a.gguf")) == {"a.gguf", "adapter_config.json"}
