"""Attention in probes and passes uses the kernels that it may, which are not cuDNN's unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sniffer.models import finder
from sniffer.models.backbone import Checkpoint
from sniffer.models.kernels import DEFAULT, allowed
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone

from sniffer.errors import ConfigError
from sniffer.storage.same_run import differences
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

finder.install()

Switches = tuple[bool, bool, bool, bool]


def switches() -> Switches:
    """Which of flash, efficient, math and cudnn torch may use now."""
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[Switches]:
    """The switches that each computation of attention has met."""
    found: list[Switches] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.append(switches())
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", scaled_dot_product_attention)
    return found


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, (True, True, True, False)),
        (["math"], (False, False, True, False)),
        (["cudnn", "flash", "math"], (True, False, True, True)),
    ],
)
def test_probes_and_passes_meet_the_same_kernels(
    checkpoint: Path, met: list[Switches], chosen: list[str] | None, expected: Switches
):
    before = switches()
    backbone = Checkpoint(str(checkpoint), device="cpu", sdpa_kernels=chosen).load()
    probes = len(met)
    with torch.inference_mode():
        backbone(tiny_ids())
    assert len(met) == probes + 2 and set(met) == {expected}
    assert switches() == before
    assert backbone.describe()["sdpa_kernels"] == list(chosen or DEFAULT)


def test_a_model_of_somebody_else_is_left_as_it_is(met: list[Switches]):
    backbone = LoadedBackbone(find_backbone(tiny_model(tiny_config("llama"))))
    assert set(met) == {switches()} and "sdpa_kernels" not in backbone.describe()


def test_kernels_are_given_back_after_an_exception():
    before = switches()
    with pytest.raises(KeyError), allowed(["math"], torch.device("cpu")):
        raise KeyError
    assert switches() == before


def test_kernels_of_which_none_fits_are_one_line(checkpoint: Path):
    with pytest.raises(ConfigError, match="sdpa_kernels=.'cudnn'.: none of them can attend on cpu .* add math"):
        Checkpoint(str(checkpoint), device="cpu", sdpa_kernels="cudnn").load()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"sdpa_kernels": "fast"}, "model.sdpa_kernels=fast is no list of kernels: give some of flash, efficient"),
        ({"sdpa_kernels": []}, "no list of kernels"),
        ({"sdpa_kernels": {"flash": 1}}, "no list of kernels"),
        (
            {"sdpa_kernels": ["math"], "attn_implementation": "eager"},
            "is for sdpa, and model.attn_implementation=eager",
        ),
    ],
)
def test_what_is_no_choice_of_kernels_is_refused(values: dict[str, Any], complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        Checkpoint("a/b", **values)


def test_the_manifest_names_them_and_other_ones_are_another_run(run: Callable):
    default, math = run("model.device=cpu"), run("model.device=cpu", "model.sdpa_kernels=[math]")
    assert default.manifest.backbone["sdpa_kernels"] == list(DEFAULT)
    then, now = (each.manifest.as_json() for each in (default, math))
    assert any("backbone.sdpa_kernels" in line for line in differences(then, now))
    del then["backbone"]["sdpa_kernels"]  # as early releases wrote it
    assert not any("backbone.sdpa_kernels" in line for line in differences(then, now))
