from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from sniffer.engine import worker
from sniffer.process.memory import M_MMAP_THRESHOLD, chosen_by_user, keep_freed_memory

FAULTS = """
import resource
import torch
from sniffer.process.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
kept = keep_freed_memory(torch.device("cpu"))
for _ in range(4):
    faults()
print(kept, faults() < before / 20)
"""
"""Five times 48 MB, which the system hands out page by page, or which are there already after some rounds."""

CPU = torch.device("cpu")

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")


VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def asked(**environment: str) -> str:
    ours = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=ours | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@needs_glibc
def test_freed_memory_is_kept_for_the_next_pass():
    assert asked() == "True True"


@pytest.mark.long
@needs_glibc
@pytest.mark.parametrize(
    "chosen",
    [
        {"MALLOC_TRIM_THRESHOLD_": "65536"},
        {"MALLOC_MMAP_THRESHOLD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=65536"},
    ],
)
def test_what_the_user_chose_stays(chosen: dict[str, str]):
    assert asked(**chosen) == "False False"


@pytest.mark.parametrize(("most", "asked_for"), [(2**30, [64, 8 * 64]), (2**25, [64, 32, 8 * 64]), (0, [64, 32])])
def test_an_older_glibc_takes_smaller_blocks(monkeypatch: pytest.MonkeyPatch, most: int, asked_for: list[int]):
    calls: list[int] = []

    def mallopt(parameter: int, value: int) -> int:
        calls.append(value // 2**20)
        return int(parameter != M_MMAP_THRESHOLD or value <= most)

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sniffer.process.memory.platform.libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr("sniffer.process.memory.ctypes.CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory(CPU) == (most > 0)
    assert calls == asked_for


@pytest.mark.parametrize(("value", "theirs"), [("glibc.malloc.perturb=1", True), ("glibc.rtld.nns=4", False)])
def test_only_tunables_of_malloc_count(monkeypatch: pytest.MonkeyPatch, value: str, theirs: bool):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", value)
    assert chosen_by_user() == theirs


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sniffer.process.memory.platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_memory(CPU)


def test_a_model_on_another_device_needs_nothing(monkeypatch: pytest.MonkeyPatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sniffer.process.memory.platform.libc_ver", lambda: ("glibc", "2.36"))
    calls: list[str] = []
    library = SimpleNamespace(mallopt=lambda *_: calls.append(""))
    monkeypatch.setattr("sniffer.process.memory.ctypes.CDLL", lambda _: library)
    assert not keep_freed_memory(torch.device("cuda"))
    assert calls == []


def test_whoever_runs_the_model_asks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked_for: list[torch.device] = []
    monkeypatch.setattr(worker, "keep_freed_memory", asked_for.append)
    monkeypatch.setattr(worker, "describe_device", lambda backbone: {})
    (tmp_path / "config.yaml").touch()
    worker.Worker(MagicMock(load=lambda: MagicMock(device=CPU)), tmp_path).open()
    assert asked_for == [CPU]
