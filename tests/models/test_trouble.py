"""A device without room for a model says so in one line, wherever on the way it runs out; nothing is held on to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sniffer.models import compiled, finder, weights
from sniffer.models.backbone import Checkpoint
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from torch import nn
from transformers import AutoModelForCausalLM

from sniffer.errors import CaptureError
from tests.tiny_families import tiny_config, tiny_model

finder.install()

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def layer_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(LoadedBackbone, "__call__", raising(error))


STAGES: dict[str, tuple[Callable[[pytest.MonkeyPatch, Exception], None], dict[str, Any]]] = {
    "while the model was loaded": (
        lambda patch, error: patch.setattr(AutoModelForCausalLM, "from_pretrained", raising(error)),
        {},
    ),
    "while the model was moved to cpu": (lambda patch, error: patch.setattr(nn.Module, "to", raising(error)), {}),
    "in a short probe of the model": (layer_fails, {}),
    "in a short probe of the compiled model": (
        lambda patch, error: patch.setattr(compiled, "_compiled", lambda forward: raising(error)),
        {"compile": True},
    ),
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", STAGES)
def test_memory_that_runs_out_is_one_line(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, stage: str, error: Exception
):
    prepare, values = STAGES[stage]
    monkeypatch.setattr(weights, "auto_class", lambda config: AutoModelForCausalLM)
    prepare(monkeypatch, error)
    with pytest.raises(CaptureError, match=f"out of memory {stage} .*narrower model.dtype") as caught:
        Checkpoint(str(checkpoint), device="cpu", **values).load()
    assert "\n" not in str(caught.value)
    assert ("model.device_map=auto" in str(caught.value)) == ("CUDA" in str(error))


def test_memory_that_runs_out_does_not_take_the_pre_kinds_away(monkeypatch: pytest.MonkeyPatch):
    """It is no property of the model that the proof of its pre kinds failed."""
    monkeypatch.setattr("sniffer.models.unrotated._first_wrong", raising(ERRORS[2]))
    with pytest.raises(RuntimeError, match="MPS backend out of memory"):
        LoadedBackbone(find_backbone(tiny_model(tiny_config("llama"))))
