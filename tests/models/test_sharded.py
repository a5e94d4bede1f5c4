"""Heads that are split over processes are refused by name; what is split otherwise is captured as if it were whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sniffer.models import finder
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone

from sniffer.errors import UnsupportedModelError
from tests.tiny_families import tiny_config, tiny_model

finder.install()

ROOT = Path(__file__).resolve().parents[2]
REFUSED = r"refused: layers.0.self_attn \(LlamaAttention\) has its heads split over 2 processes .* load the model whole"


WAYS = {"heads": REFUSED, "feed-forward": "whole", "gathered": "whole"}


@pytest.mark.long
def test_two_processes_that_share_a_model():
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.models.sharded",
        *WAYS,
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    for way, said in WAYS.items():
        lines = sorted(line for line in done.stdout.splitlines() if f", {way}: " in line)
        assert len(lines) == 2, done.stderr[-2000:]
        for rank, line in enumerate(lines):
            assert re.match(f"rank {rank}, {way}: {said}", line)


def test_a_plan_of_earlier_transformers_is_known_by_its_marks():
    """It split plain tensors, and marked the modules that it had split."""
    model = tiny_model(tiny_config("llama"))
    projection = model.model.layers[2].self_attn.k_proj
    projection._hf_tp_plan, projection._hf_device_mesh = "colwise", SimpleNamespace(size=lambda: 4)
    with pytest.raises(UnsupportedModelError, match="layers.2.self_attn .* heads split over 4 processes"):
        LoadedBackbone(find_backbone(model))
    projection._hf_device_mesh = SimpleNamespace(size=lambda: 1)
    assert len(LoadedBackbone(find_backbone(model)).geometry) == 4
