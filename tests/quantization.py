"""Weights that are quantised as they are loaded give the vectors of what the method's definition makes of them.

The witness is numpy's: each weight rounded as the method says, and put into an ordinary checkpoint. It needs the
packages of the extra [quantization], which are no part of `make test`: every import of transformers imports torchao.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from sniffer.models.backbone import Checkpoint
from transformers import AutoModelForCausalLM

import sniffer
from sniffer.errors import CheckpointError, ConfigError
from sniffer.tap import tap
from tests.eight_bits import in_steps, save_in_eight_bits
from tests.tiny_run import save_checkpoint

# bitsandbytes' kernels for the processor want 32 rows or a multiple.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}

NF4 = (
    "-1.0 -0.6961928 -0.52507305 -0.39491749 -0.28444138 -0.18477343 -0.09105004 0.0 "
    "0.0795803 0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1.0"
)
"""The 16 values of NormalFloat (Dettmers et al., QLoRA, 2023, appendix E)."""

DTYPES = {"torchao_int8": "float32", "bnb_4bit": "float32", "bnb_8bit": "float16"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "base", **SIZES)


def checkpoint(folder: Path, **changes: Any) -> Checkpoint:
    return Checkpoint(str(folder), device="cpu", **changes)


def seen(made: Checkpoint) -> list[dict[str, torch.Tensor]]:
    backbone, events = made.load(), []
    with torch.inference_mode(), tap(events.append):
        backbone(torch.arange(48).view(2, 24))
    return [{kind: getattr(event, kind).float().clone() for kind in ("q", "k", "v")} for event in events]


def by_rows(weight: np.ndarray) -> np.ndarray:
    """Eight bits, a scale for each row: the 255 steps from -128 to 127 span twice its largest value."""
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(127.5)
    return np.clip(np.rint(weight * (1 / scale)), -128, 127) * scale


def by_blocks(weight: np.ndarray) -> np.ndarray:
    """Four bits: the nearest value of NF4 times the largest of 64 weights that lie side by side."""
    table, blocks = np.array(NF4.split(), np.float32), weight.reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / largest)[..., None] - table).argmin(-1)
    # On a processor bitsandbytes keeps scales in bfloat16.
    kept = torch.from_numpy(largest).bfloat16().float().numpy()
    return (table[nearest] * kept).reshape(weight.shape)


LAWS: dict[str, Any] = {"torchao_int8": (by_rows, 2e-5), "bnb_4bit": (by_blocks, 1e-2)}
"""And how far vectors may be from them: on a processor bitsandbytes computes in bfloat16."""


def rounded(base: Path, target: Path, law: Any) -> Path:
    """An ordinary checkpoint of the weights that linear layers then have."""
    shutil.copytree(base, target)
    weights = load_file(target / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = torch.from_numpy(law(weight.numpy()).astype(np.float32))
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("method", LAWS)
def test_vectors_are_those_of_the_rounded_weights(base: Path, tmp_path: Path, method: str) -> None:
    law, room = LAWS[method]
    wanted, plain = seen(checkpoint(rounded(base, tmp_path / "rounded", law))), seen(checkpoint(base))
    for got, want, was in zip(seen(checkpoint(base, quantization=method)), wanted, plain, strict=True):
        for kind in ("q", "k", "v"):
            near = room * want[kind].abs().max()
            # What rounding itself changes is far more: the weights were quantised indeed.
            assert (got[kind] - want[kind]).abs().max() < near < (got[kind] - was[kind]).abs().max() / 5


def test_eight_bits_of_bitsandbytes_round_weights_and_states(base: Path) -> None:
    """LLM.int8: both by their row, to 127 steps. At position 0 RoPE turns nothing."""
    got = seen(checkpoint(base, quantization="bnb_8bit", dtype="float16"))[0]["q"][1, :, 0].numpy()
    weights = load_file(base / "model.safetensors")
    states = weights["model.embed_tokens.weight"][24].half().float().numpy()
    states = states / np.sqrt((states**2).mean() + 1e-6)
    weight = weights["model.layers.0.self_attn.q_proj.weight"].half().float().numpy()
    steps, rows = 127 / np.abs(states).max(), 127 / np.abs(weight).max(1, keepdims=True)
    by_hand = (np.rint(weight * rows) @ np.rint(states * steps)) / (rows[:, 0] * steps)
    exact = weight @ states
    assert np.abs(states).max() < 6  # no outliers, which are kept as they are
    # A state between two steps may go to either in float16: a step of one state is what the two may differ by.
    room = 2 * np.abs(weight).max() / steps
    assert np.abs(got.ravel() - by_hand).max() < room
    assert np.abs(got.ravel() - by_hand).mean() < np.abs(got.ravel() - exact).mean() / 3


@pytest.mark.parametrize("method", DTYPES)
def test_what_is_planned_is_what_is_in_memory(base: Path, method: str) -> None:
    made = checkpoint(base, quantization=method, dtype=DTYPES[method])
    outline, backbone = made.outline(), made.load()
    held = 0
    for part in backbone.module.modules():
        for weight in (one for one in part._parameters.values() if one is not None):
            state = getattr(weight, "quant_state", None)
            scale = getattr(
                weight, "scale", getattr(getattr(part, "state", None), "SCB", getattr(state, "absmax", None))
            )
            held += getattr(weight, "qdata", weight.data).nbytes + (0 if scale is None else scale.nbytes)
    assert held == pytest.approx(outline.weights, rel=0.03) and held < outline.parameters * outline.itemsize * 0.7
    assert outline.geometry == backbone.geometry and backbone.describe()["quantized"] == {"linear": 14, "of": 14}


@pytest.mark.parametrize("method", DTYPES)
def test_the_manifest_names_method_and_package(base: Path, method: str) -> None:
    made = checkpoint(base, quantization=method, dtype=DTYPES[method])
    told, package = made.describe()["quantization"], "torchao" if method.startswith("torchao") else "bitsandbytes"
    assert told["method"] == method and told["options"] and told[package] == __import__(package).__version__
    assert made.load().packages[package] == told[package]


def test_a_model_that_is_not_of_it_does_not_count_torchao(base: Path) -> None:
    import torchao  # noqa: F401

    assert "torchao" not in checkpoint(base).load().packages


@pytest.mark.parametrize("method", LAWS)
def test_an_adapter_is_computed_beside_the_rounded_weights(base: Path, tmp_path: Path, method: str) -> None:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, config).save_pretrained(lora := tmp_path / "lora")
    law, room = LAWS[method]
    wanted = seen(checkpoint(rounded(base, tmp_path / "rounded", law), adapter=str(lora)))
    got = seen(checkpoint(base, quantization=method, adapter=str(lora)))
    for found, want in zip(got, wanted, strict=True):
        assert (found["q"] - want["q"]).abs().max() < room * want["q"].abs().max()


@pytest.mark.parametrize("states", [False, True], ids=["weights", "weights and states"])
def test_a_checkpoint_of_compressed_tensors_shows_what_it_attends_with(
    base: Path, tmp_path: Path, states: bool
) -> None:
    """At position 0, where RoPE turns nothing, of the first layer: products of whole numbers by hand."""
    packed = save_in_eight_bits(base, tmp_path / "packed", states=states)
    weights = load_file(base / "model.safetensors")
    row = weights["model.embed_tokens.weight"][24].numpy()
    row = row / np.sqrt((row**2).mean() + 1e-6)
    steps, scale = in_steps(weights["model.layers.0.self_attn.q_proj.weight"].numpy())
    exact, room = (steps * scale) @ row, 1e-5
    if states:
        # Of 256 steps from -128 to 127 the outermost are the largest state and its opposite.
        step = np.abs(row).max() / 127.5
        assert np.abs(exact - (steps * scale) @ (np.rint(row / step) * step)).max() > 1e-3 * np.abs(exact).max()
        exact, room = (steps * scale) @ (np.clip(np.rint(row / step), -128, 127) * step), 1e-5
    by_command = seen(checkpoint(packed))[0]["q"][1, :, 0].numpy().ravel()
    assert np.abs(by_command - exact).max() < room * np.abs(exact).max()
    # In a notebook, before anything has run the model.
    model = AutoModelForCausalLM.from_pretrained(packed)
    with sniffer.sniff(model, sampler="all", layers=[0], kinds=["q"]) as captured, torch.inference_mode():
        model(torch.tensor([[24, 25, 26]]))
    rows = captured.scan().filter(pl.col("position") == 0).sort("head").collect()["vector"].to_list()
    assert np.abs(np.ravel(rows) - exact).max() < room * np.abs(exact).max()


def test_tensors_are_held_to_the_same(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_norm.*no place"):
        checkpoint(folder, quantization="torchao_int8").load()
    del weights["model.layers.0.self_attn.q_norm.weight"], weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for method in ("torchao_int8", "bnb_4bit"):
        with pytest.raises(CheckpointError, match=r"lacks.*k_proj"):
            checkpoint(folder, quantization=method).load()


def test_a_model_without_a_linear_layer_is_refused(tmp_path: Path) -> None:
    gpt2 = save_checkpoint(tmp_path / "gpt2", "gpt2", n_embd=64, n_head=2, n_layer=2, n_positions=64)
    with pytest.raises(CheckpointError, match="no linear layer that model.quantization=torchao_int8"):
        checkpoint(gpt2, quantization="torchao_int8").load()


def test_where_the_packages_do_not_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ConfigError, match=r"bitsandbytes [\d.]+ runs on cuda, and the model goes to cpu"):
        checkpoint(base, quantization="bnb_4bit").load()
