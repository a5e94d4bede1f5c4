"""The layers that are not like the others: windows, no RoPE, shared keys, other widths, other mixers."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from sniffer.models import finder
from sniffer.models.derive import Untapped
from sniffer.models.layers import check_skipped, find_backbone
from sniffer.models.loaded import LoadedBackbone
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sniffer.errors import ConfigError, UnsupportedModelError
from sniffer.forward.selection import CaptureConfig, HeadSampling, select
from sniffer.tap import Seen, tap
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

finder.install()


WITHOUT_SDPA = ("gpt_neo", "inkling2_text", "prophetnet")


def load(model_type: str, **changes: Any) -> LoadedBackbone:
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    attention = "eager" if model_type in WITHOUT_SDPA else "sdpa"
    model = tiny_model(tiny_config(model_type, **changes), attn_implementation=attention)
    return LoadedBackbone(find_backbone(model))


def events(backbone: LoadedBackbone, *, pre: bool = False) -> list[Seen]:
    seen: list[Seen] = []
    with torch.inference_mode(), tap(seen.append, pre=pre):
        backbone(tiny_ids())
    return seen


def test_a_layer_without_rope_has_pre_equal_to_post():
    backbone = load("smollm3", no_rope_layers=[1, 0, 1, 0])
    for place, event in enumerate(events(backbone, pre=True)):
        assert torch.equal(event.q, event.q_pre) is torch.equal(event.k, event.k_pre) is (place % 2 == 1)


def test_chunked_layers_record_their_chunk_though_the_call_does_not_name_it():
    backbone = load("llama4_text", attention_chunk_size=8)
    kinds = backbone.module.config.layer_types
    expected = [8 if kind == "chunked_attention" else None for kind in kinds]
    assert [layer.sliding_window for layer in backbone.geometry] == expected and set(expected) == {8, None}


def masks_received(backbone: LoadedBackbone) -> dict[int, int | None]:
    """How many tokens the last one may see by the mask that attention receives, by layer; None without a mask."""
    found: dict[int, int | None] = {}
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = kwargs["attn_mask"]
        seen = None if mask is None else mask[0, 0, -1] if mask.dtype == torch.bool else mask[0, 0, -1] > -1e4
        found[len(found)] = None if seen is None else int(seen.sum())
        return real(q, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        backbone(tiny_ids())
    return found


@pytest.mark.parametrize("model_type", ["phimoe", "doge", "llama4_text", "gemma3_text", "mistral", "qwen2_moe"])
def test_the_window_recorded_is_that_of_the_mask(model_type: str):
    """Also where one mask serves all layers and no call names its window."""
    key = "attention_chunk_size" if model_type == "llama4_text" else "sliding_window"
    extra = {"use_sliding_window": True} if model_type == "qwen2_moe" else {}
    backbone = load(model_type, **{key: 8}, **extra)
    recorded = {layer.layer: layer.sliding_window for layer in backbone.geometry}
    assert recorded == masks_received(backbone) and 8 in recorded.values()


def test_local_layers_record_their_window():
    backbone = load("gpt_neo", window_size=8)
    assert [layer.sliding_window for layer in backbone.geometry] == [None, 8, None, 8]


def test_a_window_over_generated_tokens_only_is_none_over_a_text():
    assert {layer.sliding_window for layer in load("unlimited_ocr").geometry} == {None}


def test_layers_that_share_keys_show_those_of_the_layer_they_share():
    backbone = load("gemma4", num_kv_shared_layers=2)
    assert backbone.shared_keys == {2: 0, 3: 1}
    assert backbone.describe()["shared_keys"] == {"2": 0, "3": 1}
    seen = events(backbone, pre=True)
    for layer, owner in backbone.shared_keys.items():
        for kind in ("k", "v", "k_pre"):
            assert torch.equal(getattr(seen[layer], kind), getattr(seen[owner], kind))
        assert not torch.equal(seen[layer].q, seen[owner].q)
    assert not load("llama").shared_keys


def test_widths_may_differ_by_layer_and_unequal_selections_follow():
    backbone = load("gemma4")
    assert [layer.dims["q"] for layer in backbone.geometry] == [256, 512, 256, 512]
    selection = select(backbone.geometry, CaptureConfig(head_sampling=HeadSampling(count=5, seed=2)))
    chosen = {layer: selection.heads[layer, "q"] for layer in selection.layers}
    assert sum(map(len, chosen.values())) == 5
    for layer, heads in chosen.items():
        geometry = backbone.geometry[layer]
        assert selection.heads[layer, "k"] == tuple(
            sorted({head * geometry.heads["k"] // geometry.heads["q"] for head in heads})
        )


def test_cross_attention_is_no_layer_of_self_attention():
    backbone = load("mllama")
    crossing = backbone.module.config.cross_attention_layers
    depth = len(backbone.module.layers)
    assert backbone.skipped_layers == tuple(f"layers.{layer}" for layer in crossing if layer < depth) != ()
    assert not set(crossing) & {layer.layer for layer in backbone.geometry}
    assert all("cross" not in type(module).__name__.lower() for module in backbone.layer_of)


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2"])
def test_layers_of_another_kind_are_listed(model_type: str):
    backbone = load(model_type)
    attending = [layer.layer for layer in backbone.geometry]
    assert attending == [1, 3] and backbone.skipped_layers == ("layers.0", "layers.2")
    assert backbone.describe()["skipped_layers"] == ["layers.0", "layers.2"]


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_5_vl", "mistral3"])
def test_vision_towers_are_left_out(model_type: str):
    backbone = load(model_type)
    assert not any("vision" in name or "visual" in name for name, _ in backbone.module.named_modules())
    assert len(backbone.geometry) == 4


def test_norms_and_temperatures_are_part_of_what_is_shown():
    backbone = load("qwen3")
    attention = backbone.module.layers[0].self_attn
    with torch.no_grad():
        attention.q_norm.weight.fill_(3.0)
    (first, *_) = events(backbone, pre=True)
    assert torch.allclose(first.q_pre.norm(dim=-1), torch.tensor(3.0 * 16**0.5), rtol=1e-3)


def test_attention_over_a_token_s_own_states_is_no_layer():
    backbone = load("inkling2_text")
    assert [layer.module for layer in backbone.geometry] == [f"layers.{i}.self_attn" for i in range(4)]


def test_a_forward_that_needs_more_than_tokens_is_refused():
    with pytest.raises(UnsupportedModelError, match="cannot run on token ids alone: ValueError"):
        load("idefics")


def test_kinds_that_a_model_does_not_show_are_refused_with_the_reason():
    geometry = load("llama").geometry
    for layer in geometry:
        for kind in ("q_pre", "k_pre"):
            del layer.heads[kind]  # type: ignore[attr-defined]
    assert select(geometry, CaptureConfig()).kinds == ("q", "k")
    with pytest.raises(ConfigError, match=r"names \['q_pre'\].*RoPE inside a For block.*take some of"):
        select(geometry, CaptureConfig(kinds=["q", "q_pre"]), "RoPE inside a For block")


def test_a_layer_that_attends_by_unknown_code_is_not_passed_over(monkeypatch: pytest.MonkeyPatch):
    backbone = load("llama")
    llama = sys.modules[type(backbone.module).__module__]
    unknown = Untapped("LlamaMLP", 163, "no attention call that a rule matches")
    monkeypatch.setattr(llama, finder.DERIVED_NAME, replace(llama.__sniffer_derived__, untapped=(unknown,)))
    check_skipped(backbone.module, ())
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 attends .* LlamaMLP in .*modeling_llama\.py line 163"):
        check_skipped(backbone.module, ["layers.1"])


def test_code_that_no_rule_knows_is_named_with_its_file_and_line():
    complaint = (
        r"no attention of .* ProphetNetNgramSelfAttention in .*modeling_prophetnet\.py line \d+: no attention call"
    )
    with pytest.raises(UnsupportedModelError, match=complaint):
        load("prophetnet")


def test_modules_that_answer_by_importing_another_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    """transformers 5.17 has such aliases; what they import may need a package that is not there."""

    def answer(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'torchvision'")

    alias = ModuleType("transformers.models.llama.image_processing_llama_fast")
    alias.__getattr__ = answer  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, alias.__name__, alias)
    assert load("llama").geometry
