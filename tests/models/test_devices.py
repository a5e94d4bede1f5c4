"""Which device a model goes to, and what is told where that is not what one would think. GPUs are made up here."""

from __future__ import annotations

import logging
import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sniffer.models import devices
from sniffer.models.backbone import Checkpoint

from sniffer.errors import ConfigError

pytestmark = pytest.mark.any_device


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Two GPUs; what is made the current one is noted."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in devices.VISIBLE:
        monkeypatch.delenv(name, raising=False)


def test_a_gpu_that_is_named_becomes_the_current_one(current: list[torch.device]):
    assert devices.device_of("cuda:1") == torch.device("cuda:1") == current[0]
    assert devices.device_of("cuda") == torch.device("cuda") and devices.device_of("cpu") == torch.device("cpu")
    assert len(current) == 1


@pytest.mark.parametrize(("number", "place"), [(1, 0), (2, 1), (3, 0), (12, 1)])
def test_processes_side_by_side_take_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, current: list[torch.device], number: int, place: int
):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(_identity=(number,)))
    assert devices.device_of("auto") == torch.device("cuda", place) == current[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.device_of("auto") == torch.device("cuda")


def test_a_process_alone_takes_torch_s_own_choice(monkeypatch: pytest.MonkeyPatch, current: list[torch.device]):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    assert devices.device_of("auto") == torch.device("cuda") and not current


def test_the_processes_of_joblib_are_numbered():
    """By what tells them apart above."""
    joblib = pytest.importorskip("joblib")
    found = joblib.Parallel(n_jobs=2)(joblib.delayed(numbered)() for _ in range(2))
    assert all(parent and number for parent, number in found)


def numbered() -> tuple[bool, tuple[int, ...]]:
    return multiprocessing.parent_process() is not None, multiprocessing.current_process()._identity


@pytest.mark.parametrize(
    ("cuda", "said"),
    [(None, "torch .* is built without it"), ("12.8", "sees no GPU .is the driver older than its CUDA 12.8")],
)
def test_falling_back_to_the_processor_beside_a_driver_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    no_gpu: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    cuda: str | None,
    said: str,
):
    driver = tmp_path / "version"
    monkeypatch.setattr(devices, "DRIVERS", {"NVIDIA": (driver, "no-such-tool")})
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with caplog.at_level(logging.WARNING):
        assert devices.device_of("auto").type == "cpu" and not caplog.records
        driver.write_text("NVRM version: ...")
        assert devices.device_of("cpu").type == "cpu" and not caplog.records
        assert devices.device_of("auto").type == "cpu"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and "NVIDIA driver" in record.getMessage()
        assert re.search(said, record.getMessage())
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user's own choice
        assert devices.device_of("auto").type == "cpu" and len(caplog.records) == 1


def test_a_device_map_without_accelerate_is_one_line(monkeypatch: pytest.MonkeyPatch, checkpoint: Path):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="model.device_map needs accelerate: pip install accelerate"):
        Checkpoint(str(checkpoint), device_map="auto").load()
