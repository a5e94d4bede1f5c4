"""The manifest and the first line of a log say what computes."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sniffer.process import devices
from sniffer.process.devices import device_line, hardware
from sniffer.storage.same_run import differences

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "memory": "79.1 GiB",
    "capability": "9.0",
    "driver": "550.54.15",
    "cuda": "12.8",
    "cudnn": "91002",
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC")
    properties = SimpleNamespace(total_memory=int(79.1 * (1 << 30)), major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100["name"])
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(devices, "DRIVER", file)


def test_a_gpu_is_named_with_what_drives_it(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert hardware(torch.device("cuda:1")) == H100
    assert hardware(torch.device("cpu")) == {}
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "none")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert hardware(torch.device("cuda")).keys() == H100.keys() - {"driver", "cudnn"}


def test_the_line_of_a_gpu():
    device = {"type": "cuda", "dtype": "bfloat16", **H100}
    backbone = {"attn_implementation": "sdpa", "sdpa_kernels": ["flash", "efficient", "math"]}
    assert device_line(device, backbone, 16) == (
        "computing on NVIDIA H100 80GB HBM3 (79.1 GiB, driver 550.54.15, CUDA 12.8, cuDNN 91002) in bfloat16 with sdpa "
        "attention (flash, efficient, math)"
    )
    assert device_line({"type": "cpu", "dtype": "float32"}, {}, 2) == "computing on cpu in float32 on 2 threads"


def test_a_run_says_first_on_what_it_computes(run, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="sniffer"):
        made = run("model.device=cpu")
    first = next(record.getMessage() for record in caplog.records if record.name == "sniffer.capture")
    assert first.startswith("computing on cpu in float32 with sdpa attention (flash, efficient, math) on ")
    assert made.manifest.device == {"type": "cpu", "dtype": "float32"}


def test_another_driver_or_memory_is_the_same_device_and_another_cuda_is_not():
    then, now = {"device": {"type": "cuda", **H100}}, {"device": {"type": "cuda", **H100}}
    now["device"] |= {"driver": "570.1", "memory": "79.2 GiB"}
    assert differences(then, now) == []
    assert differences({"device": {"type": "cuda", "name": H100["name"]}}, now) == []  # of an early release
    now["device"]["cuda"] = "13.0"
    assert differences(then, now) == ["device.cuda: 12.8 then, 13.0 now"]
