"""`make gpu-check` goes on after a part that fails, and writes what it found; on a processor it runs too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu_check


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict, str]]:
    """Runs some parts on the processor: the exit code, and what was written."""

    def call(*words: str) -> tuple[int, dict, str]:
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", *words])
        code = gpu_check.main()
        return code, json.loads((tmp_path / "out" / "gpu.json").read_text()), (tmp_path / "out" / "gpu.txt").read_text()

    return call


def test_it_goes_on_after_a_failed_part(check: Callable[..., tuple[int, dict, str]], monkeypatch: pytest.MonkeyPatch):
    def broken(place: gpu_check.Place) -> dict:
        raise RuntimeError("CUDA error: no such luck\nsecond line")

    monkeypatch.setattr(gpu_check, "PARTS", {"broken": broken, "environment": gpu_check.environment})
    code, found, text = check()
    assert code == 1
    assert found["broken"]["failed"] == "RuntimeError: CUDA error: no such luck"
    assert "torch" in found["environment"] and "seconds" in found["environment"]
    assert text.startswith("broken\n    failed") and "\nenvironment\n" in text


def test_no_part_begins_when_the_time_is_over(check: Callable[..., tuple[int, dict, str]]):
    code, found, _ = check("environment", "--minutes", "0.000001")
    assert code == 0 and found == {"environment": {"skipped": "the time was over"}}


def test_parts_run_on_a_processor(check: Callable[..., tuple[int, dict, str]]):
    code, found, _ = check("new_lengths", "probes", "synchronisations", "beside_the_processor")
    assert code == 0
    assert found["new_lengths"].keys() >= {"without cudnn", "cudnn"}
    assert all(found["probes"][name]["accepted"] for name in ("llama bfloat16", "qwen3_moe float16"))
    assert found["synchronisations"]["skipped"] == "no CUDA" and found["beside_the_processor"]["differ by"] == 0
