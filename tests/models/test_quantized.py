"""What is asked of model.quantization is refused early, or handed to from_pretrained; tests/quantization.py runs it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sniffer.models import quantized
from sniffer.models.backbone import Checkpoint
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from sniffer.errors import CheckpointError, ConfigError
from sniffer.storage.same_run import differences
from tests.tiny_run import save_checkpoint

VERSION = "0.50.2"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "base", dtype="float16")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that is called bitsandbytes, runs on the processor, and does nothing."""
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text(f"__version__ = '{VERSION}'\nsupported_torch_devices = {{'cpu', 'cuda'}}\n")
    told = tmp_path / f"bitsandbytes-{VERSION}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: {VERSION}\n")
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    sys.modules.pop("bitsandbytes", None)


class Rounded(nn.Parameter):
    """A weight that a package has quantised."""


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What transformers was given; it quantises nothing, but q and k are marked as if."""
    calls: list[dict[str, Any]] = []
    honest = LlamaForCausalLM.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        calls.append({key: options.pop(key, None) for key in ("quantization_config", "device_map")})
        model, info = honest(cls, *args, **options)
        for name, part in model.named_modules():
            if name.endswith(("q_proj", "k_proj")):
                part.weight = Rounded(part.weight.data)
        return model, info

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    return calls


def checkpoint(folder: Path, **changes: Any) -> Checkpoint:
    return Checkpoint(str(folder), device=changes.pop("device", "cpu"), **changes)


@pytest.mark.parametrize("method", ["bnb_4bit", "bnb_8bit"])
def test_transformers_is_told_the_method_and_where_the_model_goes(
    base: Path, stand_in: Path, given: list[dict[str, Any]], method: str
):
    backbone = checkpoint(base, quantization=method).load()
    (call,) = given
    config = call["quantization_config"]
    assert isinstance(config, BitsAndBytesConfig) and call["device_map"] == {"": "cpu"}
    assert (config.load_in_4bit, config.load_in_8bit) == (method == "bnb_4bit", method == "bnb_8bit")
    if method == "bnb_4bit":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", False)
        assert config.bnb_4bit_compute_dtype is torch.float16
    assert backbone.describe()["quantized"] == {"linear": 4, "of": 14}


def test_linear_layers_that_are_left_are_told(
    base: Path, stand_in: Path, given: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
):
    checkpoint(base, quantization="bnb_4bit").load()
    assert "10 of 14 linear layers are not quantised, such as layers.0.self_attn.v_proj" in caplog.text


def test_nothing_that_was_quantised_is_an_error():
    with pytest.raises(
        CheckpointError, match=r"no linear layer that model.quantization=bnb_4bit quantises \(1 are not"
    ):
        quantized.counted(nn.Sequential(nn.Linear(2, 2)), "bnb_4bit", "it")


def test_a_run_goes_on_with_the_same_method_and_package_only(base: Path, stand_in: Path):
    def manifest(**changes: Any) -> dict[str, Any]:
        return {"model": json.loads(json.dumps(checkpoint(base, **changes).describe()))}

    told = manifest(quantization="bnb_4bit")
    assert told["model"]["quantization"]["bitsandbytes"] == VERSION
    assert "quantization" not in manifest()["model"]
    assert differences(told, manifest(quantization="bnb_4bit")) == []
    (line,) = differences(told, manifest(quantization="bnb_8bit"))[:1]
    assert line == "model.quantization.method: bnb_4bit then, bnb_8bit now"
    assert any("bnb_4bit then, absent now" in line for line in differences(told, manifest()))
    newer = json.loads(json.dumps(told).replace(VERSION, "0.51"))
    assert differences(told, newer) == [f"model.quantization.bitsandbytes: {VERSION} then, 0.51 now"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization": "bnb_4bits"}, r"no method, did you mean bnb_4bit\? there are bnb_4bit, bnb_8bit, "),
        ({"quantization": "int8"}, r"did you mean torchao_int8\?"),
        ({"quantization": "gptq!"}, r"is no method: there are"),
        ({"quantization": 4}, r"model.quantization=4 is no method"),
        ({"weights": "random", "model_type": "llama"}, r"is for the weights of a checkpoint"),
        ({"gguf_file": "a.gguf"}, r"a.gguf is quantised already"),
        ({"merge_adapter": True}, r"set model.merge_adapter=false"),
        ({"allow_missing": True}, r"weights that are drawn are not quantised"),
        ({"config_overrides": {"text_config": {"quantization_config": {"bits": 4}}}}, r"drop the override"),
        ({"quantization": "torchao_int4"}, r"runs on CUDA only, and model.device=cpu: take torchao_int8"),
    ],
)
def test_what_cannot_be_is_refused_at_once(base: Path, stand_in: Path, changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        checkpoint(base, **{"quantization": "bnb_4bit", **changes})


@pytest.mark.parametrize(("method", "package"), [("bnb_8bit", "bitsandbytes"), ("torchao_int8", "torchao")])
def test_a_missing_package_is_named(base: Path, monkeypatch: pytest.MonkeyPatch, method: str, package: str):
    honest = quantized.find_spec
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if name == package else honest(name))
    with pytest.raises(ConfigError, match=rf"needs {package}: pip install 'qk-sniffer\[quantization\]'"):
        checkpoint(base, quantization=method)


def test_a_checkpoint_is_not_quantised_again(base: Path, tmp_path: Path, stand_in: Path):
    config = json.loads((base / "config.json").read_text())
    shutil.copytree(base, tmp_path / "twice")
    gptq = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "twice" / "config.json").write_text(json.dumps({**config, "quantization_config": gptq}))
    made = checkpoint(tmp_path / "twice", quantization="bnb_4bit")
    for ask in (made.limits, made.outline, made.load):
        with pytest.raises(ConfigError, match="quantised already, and is loaded as it is: drop it"):
            ask()


def test_an_adapter_within_the_checkpoint_is_to_be_moved(base: Path, tmp_path: Path, stand_in: Path):
    shutil.copytree(base, tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match=r"has an adapter in it: move its files .* model.adapter=FOLDER"):
        checkpoint(tmp_path / "adapted", quantization="bnb_4bit").limits()


def test_a_method_that_computes_in_one_type_wants_the_model_in_it(base: Path, stand_in: Path):
    with pytest.raises(
        ConfigError, match=r"computes in float16, and the model is in bfloat16: set model.dtype=float16"
    ):
        checkpoint(base, quantization="bnb_8bit", dtype="bfloat16").limits()
    assert checkpoint(base, quantization="bnb_8bit").limits().layers == 2


@pytest.mark.parametrize("known", ["{'cuda'}", None])
def test_a_device_that_the_package_has_nothing_for_is_named(base: Path, stand_in: Path, known: str | None):
    """Releases without a list are for CUDA alone."""
    (stand_in / "__init__.py").write_text("" if known is None else f"supported_torch_devices = {known}\n")
    said = rf"bitsandbytes {VERSION} runs on cuda, and the model goes to cpu: choose another model.device or method"
    with pytest.raises(ConfigError, match=said):
        checkpoint(base, quantization="bnb_4bit").load()


def test_four_bits_of_torchao_need_tensor_cores(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU of capability 8.0, and the model goes to cpu"):
        quantized.options_of("torchao_int4", torch.device("cpu"), torch.bfloat16, mapped=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU of capability 8.0"):
        quantized.options_of("torchao_int4", torch.device("cuda"), torch.bfloat16, mapped=False)


def test_a_package_that_cannot_be_imported_is_told(base: Path, stand_in: Path):
    (stand_in / "__init__.py").write_text("raise RuntimeError('no such symbol')\n")
    with pytest.raises(ConfigError, match=r"bitsandbytes cannot be used \(no such symbol\)"):
        checkpoint(base, quantization="bnb_4bit").load()


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        ("bnb_4bit", 4 + 32 / 64),
        ("bnb_8bit", 8 + 32 / 4096),
        ("torchao_int8", 8 + 32 / 4096),
        ("torchao_int4", 4 + 32 / 128),
    ],
)
def test_a_large_layer_takes_its_bits_and_its_scales(method: str, bits: float):
    layers = nn.Sequential(nn.Embedding(10, 16), nn.Linear(4096, 2048, bias=False), nn.LayerNorm(16))
    assert quantized.weight_bytes(layers, method, 2) == 4096 * 2048 * bits / 8 + (10 * 16 + 2 * 16) * 2
