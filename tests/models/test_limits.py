"""Limits that a config tells are the model's: texts are cut where positions end, and what lies beyond is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sniffer.models import finder
from sniffer.models.layers import find_backbone
from sniffer.models.limits import limits_of
from sniffer.models.loaded import LoadedBackbone
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sniffer.engine.lengths import token_limit
from sniffer.errors import ConfigError
from tests.conformance.lengths import check_limits
from tests.tiny_families import tiny_config, tiny_ids, tiny_model
from tests.tiny_run import save_checkpoint

finder.install()


def limit(limits: Any, wanted: int | None) -> int | None:
    config: Any = SimpleNamespace(dataset=SimpleNamespace(max_tokens=wanted), generate=None)
    return token_limit(config, limits)


@pytest.mark.parametrize(
    ("family", "most", "changes"),
    [
        ("llama", 128, {}),
        ("gpt2", 128, {}),
        ("opt", 128, {}),
        ("roberta", 126, {"pad_token_id": 1}),
        ("xlm-roberta", 123, {"pad_token_id": 4}),
        ("bert", 128, {"pad_token_id": 1}),
        ("whisper", 128, {}),
        ("mpt", 128, {}),
        ("bloom", None, {}),
    ],
)
def test_the_longest_text_is_as_long_as_the_positions(family: str, most: int | None, changes: dict[str, Any]):
    config = tiny_config(family, **changes)
    kind = "eager" if family in ("bloom", "mpt") else "sdpa"
    model = tiny_model(config, attn_implementation=kind)
    backbone = LoadedBackbone(find_backbone(model))
    limits = limits_of(config)
    assert limits.max_positions == most and check_limits(model, backbone) == ""
    assert limit(limits, None) == most
    if most is not None:
        with torch.inference_mode():
            backbone(tiny_ids(1, most))
        with pytest.raises(
            ConfigError, match=f"dataset.max_tokens={most + 1} is more than the model's {most} positions"
        ):
            limit(limits, most + 1)


@pytest.mark.parametrize("family", ["bart", "marian", "whisper", "t5", "udop"])
def test_layers_are_counted_in_the_decoder(family: str):
    config = tiny_config(family)
    depth = "num_decoder_layers" if hasattr(config, "num_decoder_layers") else "decoder_layers"
    setattr(config, depth, 7)
    assert limits_of(config).layers == 7


def test_heads_that_differ_by_kind_of_layer_are_counted_where_they_are_most():
    if "inkling_text" not in CONFIG_MAPPING_NAMES:
        pytest.skip("this transformers has no inkling_text")
    config = tiny_config("inkling_text")
    assert config.num_attention_heads < limits_of(config).query_heads == config.swa_num_attention_heads


SCALED = {"rope_theta": 10000.0, "factor": 4.0}


def test_dynamic_scaling_reaches_as_far_as_its_factor():
    limits = limits_of(tiny_config("llama", rope_parameters={"rope_type": "dynamic", **SCALED}))
    assert (limits.max_positions, limits.reach, limit(limits, None), limit(limits, 512)) == (128, 512, 128, 512)
    with pytest.raises(ConfigError, match=r"513 is more than the model's 512 .*\{rope_parameters: \{factor: 5.0\}\}'"):
        limit(limits, 513)


def test_the_advice_fits_the_model():
    advice = {
        "llama": "'model.config_overrides={max_position_embeddings: 200}' and a RoPE scaling",
        "gpt2": "unless its positions are learned, extend the model with 'model.config_overrides={max_position_embedd",
        "mpt": "unless its positions are learned, extend the model with 'model.config_overrides={max_seq_len: 200}'",
        "roberta": "'model.config_overrides={max_position_embeddings: 202}'",
    }
    for family, expected in advice.items():
        more = {"pad_token_id": 1} if family == "roberta" else {}
        with pytest.raises(ConfigError) as told:
            limit(limits_of(tiny_config(family, **more)), 200)
        assert expected in str(told.value)


def test_a_run_over_texts_longer_than_a_table_of_positions(run: Callable, tmp_path: Path):
    folder = save_checkpoint(tmp_path / "roberta", "roberta", is_decoder=True, max_position_embeddings=100)
    captured = run(f"model.checkpoint={folder}", "sampler=all")
    assert max(captured.vectors(layer=0, head=0, kind="q").positions) == 98
    assert captured.manifest.counts["truncated"] == 2
