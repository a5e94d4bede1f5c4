"""Random models are of the shape of the checkpoint that they stand for, wherever conf/model states it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from sniffer.models.backbone import Checkpoint

from sniffer.config.resolve import conf_folder
from sniffer.errors import ConfigError
from sniffer.storage.same_run import differences

# Layers that attend: query heads, key heads, head size. Then parameters without the output layer, in billions, that the
# publishers' model cards and papers give, or that follow from the total they give; None where theirs counts more.
PUBLISHED = {
    "bloom": (24, 16, 16, 128, 1.72),
    "cohere2": (32, 32, 8, 128, 8.03),
    "deepseek_v2": (27, 16, 16, 192, 15.5),
    "deepseek_v3": (61, 128, 128, 192, 670.1),
    "exaone4": (30, 32, 8, 64, 1.28),
    "falcon": (32, 71, 1, 64, 6.92),
    "gemma": (18, 8, 1, 256, 2.51),
    "gemma2": (26, 8, 4, 256, 2.61),
    "gemma3": (26, 4, 1, 256, 1.0),
    "gemma3n": (30, 8, 2, 256, None),
    "glm": (40, 32, 2, 128, 8.78),
    "glm4": (40, 32, 2, 128, 8.78),
    "glm4_moe": (92, 96, 8, 128, 352.0),
    "gpt2": (12, 12, 12, 64, 0.124),
    "gpt_neox": (24, 16, 16, 128, 1.31),
    "gpt_oss": (24, 64, 8, 64, 20.3),
    "gptj": (28, 16, 16, 256, 5.84),
    "granite": (40, 32, 8, 128, 8.17),
    "jamba": (4, 32, 8, 128, 51.3),
    "lfm2": (6, 32, 8, 64, 1.17),
    "llama3": (32, 32, 8, 128, 7.50),
    "llama3_1": (32, 32, 8, 128, 7.50),
    "llama3_2": (16, 32, 8, 64, 1.24),
    "llama4": (48, 40, 8, 128, 106.7),
    "ministral": (36, 32, 8, 128, 7.48),
    "ministral3": (26, 32, 8, 128, 3.43),
    "mistral": (32, 32, 8, 128, 7.11),
    "mistral3": (40, 32, 8, 128, 22.9),
    "mixtral": (32, 32, 8, 128, 46.57),
    "mllama": (32, 32, 8, 128, 9.25),
    "olmo2": (16, 16, 16, 128, 1.28),
    "olmo3": (32, 32, 32, 128, 6.89),
    "opt": (24, 32, 32, 64, 1.32),
    "phi": (32, 32, 32, 80, 2.65),
    "phi3": (32, 32, 32, 96, 3.72),
    "qwen2": (28, 28, 4, 128, 7.07),
    "qwen2_5": (24, 14, 2, 64, 0.494),
    "qwen3": (28, 16, 8, 128, 0.596),
    "qwen3_moe": (48, 32, 4, 128, 30.2),
    "qwen3_next": (12, 16, 2, 256, 79.4),
    "smollm3": (36, 16, 4, 128, 3.08),
    "starcoder2": (30, 24, 2, 128, 3.03),
}

UNSTATED = {"checkpoint", "smollm2", "gemma4"}
"""No checkpoint, one that is always on this machine, and one whose numbers nobody here is sure of."""

WINDOWS = {
    "cohere2": (24, 4096),
    "gemma2": (13, 4096),
    "gemma3": (22, 512),
    "gemma3n": (24, 512),
    "gpt_oss": (12, 128),
    "llama4": (36, 8192),
    "ministral": (27, 32768),
    "olmo3": (24, 4096),
    "phi3": (32, 262144),
    "starcoder2": (30, 4096),
}
"""How many layers look back over so many positions; in all others, over everything."""

LARGER = {
    ("llama3", "meta-llama/Meta-Llama-3-70B"): (80, 64, 8, 128),
    ("llama3_2", "meta-llama/Llama-3.2-3B"): (28, 24, 8, 128),
    ("ministral3", "mistralai/Ministral-3-14B-Base-2512"): (40, 32, 8, 128),
    ("mistral", "mistralai/Mistral-7B-Instruct-v0.2"): (32, 32, 8, 128),
    ("qwen3", "Qwen/Qwen3-8B"): (36, 32, 8, 128),
    ("qwen2_5", "Qwen/Qwen2.5-14B"): (48, 40, 8, 128),
    ("gpt2", "openai-community/gpt2-xl"): (48, 25, 25, 64),
}


def random_model(choice: str, **changes: Any) -> Checkpoint:
    written = yaml.safe_load((conf_folder() / "model" / f"{choice}.yaml").read_text())
    named = {key: written.get(key) for key in ("checkpoint", "model_type", "architecture")}
    return Checkpoint(**{**named, "weights": "random", "device": "cpu", "tokenizer": "none/such", **changes})


def test_the_table_is_of_all_choices() -> None:
    assert {path.stem for path in (conf_folder() / "model").glob("*.yaml")} == {*PUBLISHED, *UNSTATED}


@pytest.mark.long
@pytest.mark.parametrize("choice", PUBLISHED)
def test_a_random_model_has_the_shape_of_its_checkpoint(choice: str) -> None:
    layers, queries, keys, dim, billions = PUBLISHED[choice]
    outline = random_model(choice).outline()
    assert len(outline.geometry) == layers
    for layer in outline.geometry:
        assert (layer.heads["q"], layer.heads["k"], layer.dims["q"], layer.dims["k"]) == (queries, keys, dim, dim)
    windows = [layer.sliding_window for layer in outline.geometry if layer.sliding_window is not None]
    sliding, window = WINDOWS.get(choice, (0, None))
    assert windows == [window] * sliding
    assert billions is None or outline.parameters / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(("choice", "checkpoint"), LARGER)
def test_other_sizes_have_numbers_of_their_own(choice: str, checkpoint: str) -> None:
    layers, queries, keys, dim = LARGER[choice, checkpoint]
    limits = random_model(choice, checkpoint=checkpoint).limits()
    assert (limits.layers, limits.query_heads, limits.key_heads) == (layers, queries, keys)
    geometry = random_model(choice, checkpoint=checkpoint, config_overrides={"num_hidden_layers": 1}).outline().geometry
    assert [(layer.heads["q"], layer.heads["k"], layer.dims["k"]) for layer in geometry] == [(queries, keys, dim)]


def test_a_default_geometry_is_said_and_recorded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        random_model("llama3").limits()
        assert not caplog.records
        random_model("llama3", checkpoint="nobody/other").limits()
    (record,) = caplog.records
    assert "default of LlamaConfig, not that of nobody/other: 32 layers, 32 query and 32 key heads" in record.message
    assert random_model("llama3").describe()["geometry"] == "stated by the configuration"
    assert random_model("gemma4").describe()["geometry"] == "default"


def test_numbers_never_come_before_a_config_on_this_machine(tmp_path: Path) -> None:
    small = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({**small, "num_key_value_heads": 2}))
    numbers = {str(tmp_path): {"num_attention_heads": 8, "num_key_value_heads": 8}}
    made = random_model("llama3", checkpoint=str(tmp_path), architecture=numbers)
    limits = made.limits()
    assert (limits.layers, limits.query_heads, limits.key_heads) == (2, 4, 2)
    assert "geometry" not in made.describe()


def test_overrides_come_last_and_derived_sizes_follow() -> None:
    made = random_model("llama3", config_overrides={"num_hidden_layers": 1, "hidden_size": 2048})
    (layer,) = made.outline().geometry
    assert (layer.heads["q"], layer.heads["k"], layer.dims["q"]) == (32, 8, 64)


def test_numbers_that_are_none_are_refused() -> None:
    for wrong in ({"hidden_size": 64}, {"nobody/nothing": {}}):
        with pytest.raises(ConfigError, match=r"model\.architecture.*no mapping from checkpoints"):
            Checkpoint("nobody/nothing", weights="random", model_type="llama", architecture=wrong)
    odd = {"nobody/nothing": {"num_attention_heads": "many"}}
    with pytest.raises(ConfigError, match=r"model\.architecture is no llama"):
        Checkpoint("nobody/nothing", weights="random", model_type="llama", architecture=odd).limits()


def test_early_runs_knew_no_other_geometry_than_the_default() -> None:
    now = random_model("gemma4").describe()
    early = {key: value for key, value in now.items() if key != "geometry"}
    assert not differences({"model": early}, {"model": now})
    stated = {**now, "geometry": "stated by the configuration"}
    assert differences({"model": early}, {"model": stated})
    tokenizer = {"class": "T", "sha256": "1"}
    recorded = {**tokenizer, "source": "embedded:it", "stand_in": True}
    assert not differences({"model": {"tokenizer": tokenizer}}, {"model": {"tokenizer": recorded}})
    other = {**recorded, "sha256": "2"}
    assert differences({"model": {"tokenizer": tokenizer}}, {"model": {"tokenizer": other}})
