"""An override changes what it names, and nothing else; values that no model can have are refused before any weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder, weights
from sniffer.models.architecture import build_config, override, read_config
from sniffer.models.backbone import Checkpoint
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sniffer.errors import ConfigError
from tests.helpers_overrides import changed_too_much, differences
from tests.tiny_families import tiny_config, tiny_model

finder.install()

FAMILIES = ("llama", "gpt2", "bloom", "gemma3", "gemma4_text", "deepseek_v3", "mistral3", "gpt_oss", "phi3", "bart")
STRICT = hasattr(PretrainedConfig, "validate")
"""Early releases of transformers 5 take any value, and fail when the model is built."""

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99}
BASE = 1_000_000.0


def folder_of(path: Path, **config: Any) -> Path:
    """A folder with a config.json that says just this."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **config}))
    return path


def read(path: Path, **overrides: Any) -> PretrainedConfig:
    return read_config(str(path), overrides)


def changes(path: Path, **overrides: Any) -> dict[str, Any]:
    """What differs from the file's own config, by dotted name."""
    found = differences(AutoConfig.from_pretrained(path), read(path, **overrides))
    return {".".join(name): now for name, (_, now) in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_changes_alone(family: str):
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {family}")
    assert changed_too_much(family) == []


OLD = {"rope_theta": BASE, "rope_scaling": None}
NEW = {"rope_parameters": {"rope_type": "default", "rope_theta": BASE}}
LINEAR = {"factor": 4.0}


@pytest.mark.parametrize("said", [OLD, NEW], ids=["older file", "file"])
@pytest.mark.parametrize(
    "named",
    [
        {"rope_scaling": {"type": "linear", **LINEAR}},
        {"rope_scaling": {"rope_type": "linear", **LINEAR}},
        {"rope_parameters": {"rope_type": "linear", **LINEAR}},
    ],
    ids=["rope_scaling.type", "rope_scaling", "rope_parameters"],
)
def test_a_scaling_keeps_the_base_whoever_spells_it(tmp_path: Path, said: dict[str, Any], named: dict[str, Any]):
    path = folder_of(tmp_path, **said)
    assert changes(path, **named) == {"rope_parameters.rope_type": "linear", "rope_parameters.factor": 4.0}
    model = tiny_model(read(path, **named))
    # The formula of the frequencies, with the checkpoint's base and the factor that was named.
    assert np.allclose(model.model.rotary_emb.inv_freq, BASE ** (-np.arange(0, 16, 2) / 16) / 4, rtol=1e-5)


@pytest.mark.parametrize("said", [OLD, NEW], ids=["older file", "file"])
def test_the_base_is_named_in_either_spelling(tmp_path: Path, said: dict[str, Any]):
    path = folder_of(tmp_path, **said)
    assert changes(path, rope_theta=5e5) == {"rope_parameters.rope_theta": 5e5}
    assert changes(path, rope_parameters={"rope_theta": 5e5}) == {"rope_parameters.rope_theta": 5e5}
    both = changes(path, rope_theta=5e5, rope_scaling={"type": "linear", **LINEAR})
    assert both == {
        f"rope_parameters.{key}": value for key, value in {"rope_theta": 5e5, "rope_type": "linear", **LINEAR}.items()
    }


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_no_scaling_is_the_default_one_with_the_base(tmp_path: Path, key: str):
    path = folder_of(tmp_path, rope_theta=BASE, rope_scaling={"type": "linear", **LINEAR})
    assert changes(path, **{key: None}) == {"rope_parameters.rope_type": "default"}
    model = tiny_model(read(path, **{key: None}))
    assert np.allclose(model.model.rotary_emb.inv_freq, BASE ** (-np.arange(0, 16, 2) / 16), rtol=1e-5)


def test_a_longer_context_does_not_move_what_a_scaling_starts_from(tmp_path: Path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    plain = folder_of(tmp_path / "plain", max_position_embeddings=1024)
    found = changes(plain, rope_parameters=yarn)
    assert found.pop("rope_parameters.original_max_position_embeddings") == 1024
    assert found == {f"rope_parameters.{key}": value for key, value in yarn.items()}
    with pytest.raises(ConfigError, match="original_max_position_embeddings: None, now 4096.*name these too"):
        read(plain, max_position_embeddings=4096, rope_parameters=yarn)
    whole = {**yarn, "original_max_position_embeddings": 1024}
    config = read(plain, max_position_embeddings=4096, rope_parameters=whole)
    assert config.rope_parameters["original_max_position_embeddings"] == 1024
    scaled = folder_of(tmp_path / "scaled", max_position_embeddings=1024, rope_scaling={"type": "yarn", "factor": 4.0})
    with pytest.raises(ConfigError, match="original_max_position_embeddings: 1024, now 4096"):
        read(scaled, max_position_embeddings=4096)


def test_numbers_that_a_config_keeps_twice_are_changed_together(tmp_path: Path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    longrope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": BASE, **factors}
    said = {
        "model_type": "phi3",
        "rope_parameters": longrope,
        "original_max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    path = folder_of(tmp_path, max_position_embeddings=256, **said)
    inside = {"rope_parameters": {"original_max_position_embeddings": 32}}
    for named in ({"original_max_position_embeddings": 32}, inside):
        names = ("original_max_position_embeddings", "rope_parameters.original_max_position_embeddings")
        assert changes(path, **named) == dict.fromkeys(names, 32)


def test_where_layers_rotate_differently_the_type_is_named(tmp_path: Path):
    kinds = ["sliding_attention", "full_attention"] * 2
    said = {"rope_theta": BASE, "rope_local_base_freq": 10_000.0, "layer_types": kinds, "num_key_value_heads": 2}
    path = folder_of(tmp_path, model_type="gemma3_text", **said)
    found = changes(path, rope_parameters={"full_attention": {"rope_type": "linear", **LINEAR}})
    place = "rope_parameters.full_attention"
    assert found == {f"{place}.rope_type": "linear", f"{place}.factor": 4.0}
    assert found == changes(path, rope_scaling={"full_attention": {"type": "linear", **LINEAR}})
    flat: list[dict[str, Any]] = [{"rope_theta": 5.0}, {"rope_scaling": {"type": "linear", **LINEAR}}]
    for named in (*flat, {"rope_parameters": {"rope_theta": 5.0}}):
        with pytest.raises(ConfigError, match="differ by type of layer.*name one of"):
            read(path, **named)


def test_shapes_follow_where_the_file_does_not_say_them(tmp_path: Path):
    silent, outspoken = folder_of(tmp_path / "a"), folder_of(tmp_path / "b", head_dim=16, num_key_value_heads=2)
    assert changes(silent, hidden_size=128) == {"hidden_size": 128, "head_dim": 32}
    assert changes(outspoken, hidden_size=128) == {"hidden_size": 128}
    assert changes(silent, num_attention_heads=8) == {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 8,
    }
    assert changes(outspoken, num_attention_heads=8) == {"num_attention_heads": 8}


def test_a_layer_stays_what_it_was_in_a_model_of_fewer(tmp_path: Path):
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    path = folder_of(tmp_path, model_type="qwen3", head_dim=16, layer_types=kinds, eos_token_id=[1, 2, 3, 4])
    assert changes(path, num_hidden_layers=2) == {"num_hidden_layers": 2, "layer_types": kinds[:2]}
    gpt2 = tiny_config("gpt2")
    assert gpt2.attribute_map["num_hidden_layers"] == "n_layer"
    for key in ("num_hidden_layers", "n_layer"):
        assert override(gpt2, {key: 2}).n_layer == 2


def test_an_inner_model_keeps_what_sets_it_apart():
    whole = AutoConfig.for_model("mistral3") if "mistral3" in CONFIG_MAPPING_NAMES else None
    if whole is None:
        pytest.skip("this transformers has no mistral3")
    config = build_config("mistral3", {"num_hidden_layers": 2})
    assert set(differences(whole, config)) == {("num_hidden_layers",)}


def test_what_a_config_does_not_heed_is_refused():
    with pytest.raises(ConfigError, match="num_hidden_layers is the encoder's in a bart config: name decoder_layers"):
        build_config("bart", {"num_hidden_layers": 2})
    with pytest.raises(ConfigError, match="rope_scaling is no key of a gpt2 config"):
        build_config("gpt2", {"rope_scaling": {"type": "linear", **LINEAR}})
    if STRICT:
        with pytest.raises(ConfigError, match="head_dim=128 has no effect: a deepseek_v2 config makes 64 of it"):
            build_config("deepseek_v2", {"head_dim": 128})


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"max_position_embeddings": -1}, r"max_position_embeddings=-1 must be a whole number of 1 or more"),
        ({"max_position_embeddings": 0}, r"max_position_embeddings=0 must be"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 must be"),
        ({"num_hidden_layers": -2}, r"num_hidden_layers=-2 must be"),
        ({"hidden_size": 0}, r"hidden_size=0 must be"),
        ({"hidden_size": 64.5}, r"hidden_size=64.5 must be"),
        ({"vocab_size": "many"}, r"vocab_size='many' must be"),
        ({"num_attention_heads": True}, r"num_attention_heads=True must be"),
        (
            {"num_attention_heads": 3},
            r"multiple of .*(3|2)",
        ),
        ({"num_key_value_heads": 3}, r"num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, r"rope_type='nonsense' is none that transformers knows"),
        ({"rope_scaling": {"type": "nonsense"}}, r"rope_type='nonsense' is none that transformers knows"),
        ({"rope_theta": 0}, r"rope_theta=0 must be a number above 0"),
        ({"rope_parameters": {"rope_theta": -1.0}}, r"rope_theta=-1.0 must be a number above 0"),
        ({"rope_parameters": {"rope_theta": "big"}}, r"rope_theta='big' must be a number above 0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, r"factor=0.0 must be a number above 0"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"factor"),
        ({"rope_parameters": {"fator": 4.0}}, r"rope_parameters.fator is no rotary parameter of a llama config"),
        ({"rope_parameters": 4}, r"rope_parameters=4 must be a mapping"),
    ],
)
@pytest.mark.parametrize("kind", ["pretrained", "random"])
def test_values_that_no_model_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, Any], told: str, kind: str
):
    for function in ("read", "draw"):
        monkeypatch.setattr(weights, function, lambda *_, **__: pytest.fail("weights were wanted"))
    (folder_of(tmp_path, num_key_value_heads=2) / "model.safetensors").touch()
    for ask in ("limits", "load"):
        with pytest.raises(ConfigError, match=told) as error:
            getattr(Checkpoint(str(tmp_path), weights=kind, device="cpu", config_overrides=named), ask)()
        assert "\n" not in str(error.value)


def test_a_checkpoint_that_no_code_can_build_is_one_line(tmp_path: Path):
    from sniffer.errors import CheckpointError

    model = tiny_model(tiny_config("llama"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = {"rope_theta": 10000.0, "rope_type": "nonsense"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(CheckpointError, match="cannot be loaded: KeyError: 'nonsense'"):
        Checkpoint(str(tmp_path), device="cpu").load()


def test_random_weights_heed_the_same_law():
    tiny = {**SIZES, "num_hidden_layers": 1}
    plain = Checkpoint("nobody/nothing", weights="random", device="cpu", model_type="llama", config_overrides=tiny)
    scaled = {**tiny, "rope_scaling": {"type": "linear", **LINEAR}, "rope_theta": BASE}
    other = Checkpoint("nobody/nothing", weights="random", device="cpu", model_type="llama", config_overrides=scaled)
    assert {name[-1] for name in differences(plain._config(), other._config())} == {"rope_theta", "rope_type", "factor"}
    assert torch.equal(
        plain.load().module.layers[0].self_attn.q_proj.weight, other.load().module.layers[0].self_attn.q_proj.weight
    )
