"""Only a checkpoint's own tensors: what is missing, misshapen or left over is named, and nothing is drawn at random."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sniffer.models import finder
from sniffer.models.backbone import Checkpoint
from sniffer.models.loaded import LoadedBackbone
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sniffer.errors import CheckpointError, ConfigError
from sniffer.tap import Seen, tap
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

finder.install()

Change = Callable[[dict[str, torch.Tensor]], Any]
WEIGHTS = "model.safetensors"


def saved(folder: Path, family: str = "llama", change: Change = lambda tensors: None, **config: Any) -> Path:
    """A tiny checkpoint whose tensors were changed after it was saved."""
    tiny_model(tiny_config(family, **config)).save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def load(folder: Path, **overrides: Any) -> LoadedBackbone:
    return Checkpoint(str(folder), device="cpu", config_overrides=overrides).load()


def vectors(backbone: LoadedBackbone) -> list[torch.Tensor]:
    seen: list[Seen] = []
    with torch.inference_mode(), tap(seen.append):
        backbone(tiny_ids())
    return [states for event in seen for states in (event.q, event.k, event.v)]


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.key_proj.weight"] = tensors.pop("model.layers.1.self_attn.k_proj.weight")


def widened(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(8, 64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
            r"lacks 1 tensor \(model.layers.1.self_attn.q_proj",
        ),
        (lambda t: t.pop("model.embed_tokens.weight"), r"lacks 1 tensor \(model.embed_tokens.weight\)"),
        (dict.clear, r"lacks 38 tensors \(.*; and 35 more\)"),
        (renamed, r"lacks 1 tensor \(model.layers.1.self_attn.k_proj.weight\)"),
        (widened, r"self_attn.q_proj.weight: \(8, 64\), where the model has \(64, 64\)"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}), r"q_proj.bias\), for which"),
        (
            lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(96, 64)}),
            r"has 1 tensor \(model.layers.4",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_named(tmp_path: Path, change: Change, named: str):
    with pytest.raises(CheckpointError, match=named) as told:
        load(saved(tmp_path, change=change))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("missing", ["w1", "w2"])
def test_experts_that_are_not_complete_are_named(tmp_path: Path, missing: str):
    name = f"model.layers.1.block_sparse_moe.experts.2.{missing}.weight"
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts"):
        load(saved(tmp_path, "mixtral", lambda tensors: tensors.pop(name)))


def test_an_override_that_asks_for_another_model_is_named(tmp_path: Path):
    folder = saved(tmp_path)
    for overrides in ({"num_hidden_layers": 6}, {"vocab_size": 200}, {"attention_bias": True}):
        with pytest.raises(ConfigError, match="model.config_overrides asks for another model"):
            load(folder, **overrides)


def test_an_override_may_take_layers_away(tmp_path: Path):
    folder = saved(tmp_path)
    whole, short = vectors(load(folder)), vectors(load(folder, num_hidden_layers=2))
    assert len(short) == 6 and all(torch.equal(a, b) for a, b in zip(short, whole, strict=False))


def test_an_override_may_take_biases_away(tmp_path: Path):
    folder = saved(tmp_path, attention_bias=True)
    biased, plain = (
        load(folder, **named).module.layers[0].self_attn.q_proj for named in ({}, {"attention_bias": False})
    )
    assert plain.bias is None and torch.equal(plain.weight, biased.weight)


def test_what_stands_beside_the_backbone_is_not_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def beside(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("lm_head.weight")
        tensors["score.weight"] = torch.zeros(2, 64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["model.layers.0.self_attn.masked_bias"] = torch.zeros(())
        tensors["model.mtp.layers.0.weight"] = torch.zeros(2)

    reference = vectors(load(saved(tmp_path / "whole")))
    with caplog.at_level(logging.WARNING):
        found = vectors(load(saved(tmp_path / "other", change=beside)))
    assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    assert ["model.mtp.layers.0.weight" in record.message for record in caplog.records] == [True]


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path):
    folder = saved(tmp_path, change=lambda t: t.update({"model.layers.4.eh_proj.weight": torch.zeros(2)}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert len(load(folder).geometry) == 4


def test_a_checkpoint_of_the_backbone_alone_is_whole(tmp_path: Path):
    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    reference = vectors(load(saved(tmp_path / "whole")))
    found = vectors(load(saved(tmp_path / "bare", change=bare)))
    assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    with pytest.raises(CheckpointError, match=r"has 1 tensor \(layers.0.self_attn.q_extra\)"):
        load(
            saved(
                tmp_path / "more", change=lambda t: (bare(t), t.update({"layers.0.self_attn.q_extra": torch.ones(1)}))
            )
        )


@pytest.mark.parametrize("shape", ["sharded", "bin"])
def test_other_files_are_held_to_the_same(tmp_path: Path, shape: str):
    model = tiny_model(tiny_config("llama"))
    model.save_pretrained(tmp_path, max_shard_size="100KB" if shape == "sharded" else "1GB")
    if shape == "bin":
        (tmp_path / WEIGHTS).unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert len(load(tmp_path).geometry) == 4
    file = sorted(tmp_path.glob("model-*" if shape == "sharded" else "*.bin"))[-1]
    tensors = load_file(file) if shape == "sharded" else torch.load(file)
    name = next(name for name in tensors if "layers" in name)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"}) if shape == "sharded" else torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensor \({name}\)"):
        load(tmp_path)


def test_a_tower_that_is_missing_is_no_matter_to_the_language_model(tmp_path: Path):
    if "gemma3" not in CONFIG_MAPPING_NAMES:
        pytest.skip("this transformers has no gemma3")

    def blind(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "vision_tower" in name]:
            del tensors[name]

    assert len(load(saved(tmp_path, "gemma3", blind)).geometry) == 4


@pytest.mark.long
def test_what_an_adapter_is_put_on_is_held_to_the_same(tmp_path: Path):
    import peft

    folder = saved(tmp_path / "adapted")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(folder)
    plain = vectors(load(saved(tmp_path / "plain")))
    assert not any(torch.equal(a, b) for a, b in zip(vectors(load(folder))[::3], plain[::3], strict=True))
    for file, part in (
        (WEIGHTS, "0.self_attn.q_proj.weight"),
        ("adapter_model.safetensors", "0.self_attn.q_proj.lora_A"),
    ):
        tensors = load_file(folder / file)
        name = next(name for name in tensors if part in name)
        save_file(
            {other: tensor for other, tensor in tensors.items() if other != name}, folder / file, {"format": "pt"}
        )
        with pytest.raises(CheckpointError, match=rf"lacks 1 tensor \(model.layers.{part}"):
            load(folder)
        save_file({**tensors, name: torch.zeros(3, 3)}, folder / file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"model.layers.{part}.*shape|shape.*model.layers.{part}"):
            load(folder)
        save_file(tensors, folder / file, {"format": "pt"})
