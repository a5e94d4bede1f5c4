from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from sniffer import local
from sniffer.heap import keep_freed_memory

FAULTS = """
import resource
import torch
from sniffer.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
kept = keep_freed_memory()
for _ in range(4):
    faults()
print(kept, faults() < before / 20)
"""
"""Five times 48 MB, which the system hands out page by page, or which are there already after some rounds."""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")


def asked(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@needs_glibc
def test_freed_memory_is_kept_for_the_next_pass():
    assert asked() == "True True"


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


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sniffer.heap.platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_a_run_on_a_processor_asks_for_it(monkeypatch: pytest.MonkeyPatch, device: str, times: int):
    calls: list[str] = []
    monkeypatch.setattr(local, "keep_freed_memory", lambda: calls.append("kept"))
    model = type("Model", (), {"device": type("Device", (), {"type": device})})()
    config = type("Config", (), {"model": None})()
    local.LocalEngine(lambda checkpoint: model).open(config, None)  # type: ignore[arg-type]
    assert len(calls) == times
