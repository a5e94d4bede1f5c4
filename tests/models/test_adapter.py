"""An adapter on a checkpoint gives the vectors that its definition gives, or is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sniffer.models import adapter as module
from sniffer.models.backbone import Checkpoint
from sniffer.models.weights import seeded
from transformers import AutoModelForCausalLM

from sniffer.errors import CheckpointError, ConfigError
from sniffer.tap import tap
from tests.tiny_run import save_checkpoint

SCALE = 8 / 2
"""lora_alpha over r."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def checkpoint(folder: Path, **changes: Any) -> Checkpoint:
    return Checkpoint(str(folder), device="cpu", **changes)


def seen(made: Checkpoint) -> list[tuple[torch.Tensor, torch.Tensor]]:
    backbone, events = made.load(), []
    with torch.inference_mode(), tap(events.append):
        backbone(torch.arange(24).view(1, 24))
    return [(event.q.clone(), event.k.clone()) for event in events]


def by_hand(base: Path, lora: Path, target: Path) -> Path:
    """A checkpoint whose weights have the adapter added by definition: W + (alpha / r) B A."""
    shutil.copytree(base, target)
    weights, parts = load_file(target / "model.safetensors"), load_file(lora / "adapter_model.safetensors")
    downs = {name: a for name, a in parts.items() if "lora_A" in name}
    assert len(downs) == 4
    for name, a in downs.items():
        b = parts[name.replace("lora_A", "lora_B")]
        weights[name.removeprefix("base_model.model.").replace("lora_A.", "")] += SCALE * b @ a
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("merge", [True, False])
def test_vectors_are_those_of_the_adapted_weights(base: Path, lora: Path, tmp_path: Path, merge: bool) -> None:
    found = seen(checkpoint(base, adapter=str(lora), merge_adapter=merge))
    expected, plain = seen(checkpoint(by_hand(base, lora, tmp_path / "hand"))), seen(checkpoint(base))
    assert len(found) == 2
    for one, other, without in zip(found, expected, plain, strict=True):
        for mine, theirs, bare in zip(one, other, without, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(mine, bare, atol=1e-2)


def test_it_is_recorded_with_its_files(base: Path, lora: Path) -> None:
    told = checkpoint(base, adapter=str(lora), merge_adapter=True).describe()
    assert told["put_on"]["source"] == str(lora) and told["put_on"]["merged"] is True
    assert set(told["put_on"]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(digest.startswith("sha256:") for digest in told["put_on"]["files"].values())
    assert "put_on" not in checkpoint(base).describe()


@pytest.mark.parametrize("change", ["lack", "more", "shape"])
def test_an_adapter_that_does_not_fit_is_refused(base: Path, lora: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(lora, tmp_path / "lora"))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    if change == "lack":
        del tensors[name]
    elif change == "more":
        tensors[name.replace("layers.0", "layers.7").replace("layers.1", "layers.7")] = torch.zeros(2, 2)
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    words = {"lack": "lacks 1 tensors", "more": "without a place in the model, 1 tensors", "shape": "cannot be put on"}
    with pytest.raises(CheckpointError, match=words[change]) as error:
        checkpoint(base, adapter=str(folder)).load()
    assert "\n" not in str(error.value)


def test_what_is_no_adapter_is_refused_before_anything_loads(
    base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        checkpoint(base, adapter=str(base)).check()
    with pytest.raises(CheckpointError, match="holds an adapter alone: give its base as model.checkpoint"):
        checkpoint(lora).check()
    with pytest.raises(ConfigError, match="are for the weights of a checkpoint"):
        Checkpoint("nobody/nothing", weights="random", model_type="llama", adapter=str(lora))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs peft: pip install 'qk-sniffer\[peft\]'"):
        checkpoint(base, adapter=str(lora))


def test_missing_tensors_are_drawn_from_the_seed_and_recorded(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "lacking"))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensor \({name}\).*model\.allow_missing=true"):
        checkpoint(folder).load()
    first, again, other = (seen(checkpoint(folder, allow_missing=True, seed=seed)) for seed in (1, 1, 2))
    whole = seen(checkpoint(base))
    assert torch.equal(first[1][1], again[1][1]) and not torch.equal(first[1][1], other[1][1])
    assert torch.equal(first[0][1], whole[0][1]) and not torch.equal(first[1][1], whole[1][1])
    made = checkpoint(folder, allow_missing=True)
    assert made.load().describe()["missing"] == [name] and made.describe()["allow_missing"] is True
    assert "missing" not in checkpoint(base, allow_missing=True).load().describe()


def test_a_seed_leaves_what_is_drawn_elsewhere() -> None:
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(2)
    with seeded(3):
        assert torch.equal(torch.rand(2), first)
    with seeded(None):
        pass
    assert torch.equal(torch.get_rng_state(), before)
    assert json.dumps(first.tolist())
