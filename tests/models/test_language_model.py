"""Models that go on with prompts: proven at start-up, or refused by name; and the text is what transformers writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder
from sniffer.models.language_model import LoadedLanguageModel, check_writes_now, eos_of
from sniffer.models.layers import find_backbone
from sniffer.models.limits import check_writes
from sniffer.models.loaded import LoadedBackbone
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel, cache_utils

from sniffer.errors import UnsupportedModelError
from sniffer.types import Caching
from tests.models.generation_witness import FP8
from tests.tiny_families import tiny_config, tiny_model

finder.install()

FAMILIES = ("llama", "gemma3_text", "deepseek_v3", "lfm2", "granitemoehybrid", "gpt2")
EAGER = ("gemma2", "gpt_oss", "bloom")


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    how = "eager" if family in EAGER else "sdpa"
    return tiny_model(tiny_config(family, **changes), attn_implementation=how)


def loaded(model: PreTrainedModel, *caching: Caching) -> LoadedLanguageModel:
    return LoadedLanguageModel(model, LoadedBackbone(find_backbone(model)), *caching)


def written(model: LoadedLanguageModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What comes out where the likeliest token is taken each time."""
    seq = max(map(len, prompts))
    ids = np.array([[0] * (seq - len(one)) + one for one in prompts])
    mask = np.array([[0] * (seq - len(one)) + [1] * len(one) for one in prompts])
    found: list[np.ndarray] = []

    def choose(logits: Tensor) -> np.ndarray | None:
        found.append(logits.argmax(-1).numpy())
        return found[-1] if len(found) < new else None

    model.generate(ids, mask, choose, new)
    return np.stack(found, 1).tolist()


@pytest.mark.parametrize("family", [*FAMILIES, *EAGER])
def test_prompts_side_by_side_become_what_each_becomes_alone(family: str):
    """By transformers' own choice of tokens, with one prompt at a time and no padding."""
    model = model_of(family)
    ours = loaded(model)
    assert ours.pads
    prompts = [[30, 41, 52, 63, 74, 85, 96], [33, 44, 55], [21, 22, 23, 24, 25]]
    plain = dict[str, Any](max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    alone = [model.generate(torch.tensor([one]), **plain)[0, len(one) :].tolist() for one in prompts]  # type: ignore[operator]
    assert written(ours, prompts, 8) == alone


def test_what_a_generation_config_says_is_put_aside_but_for_its_ends():
    model = model_of("llama")
    model.generation_config = GenerationConfig(eos_token_id=[5, 6], repetition_penalty=9.0, min_new_tokens=3)
    assert eos_of(model) == (5, 6)
    ours, plain = loaded(model), loaded(model_of("llama"))
    assert ours.eos == (5, 6)
    prompt = [[30, 30, 30, 31, 31]]
    assert written(ours, prompt, 8) == written(plain, prompt, 8)


def test_a_cache_that_is_not_right_is_refused(monkeypatch: pytest.MonkeyPatch):
    from transformers.cache_utils import DynamicLayer

    honest = DynamicLayer.update

    def forgetful(self: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = honest(self, key, value, *args, **kwargs)
        self.values = self.values * 1.5
        return keys, values

    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    with pytest.raises(UnsupportedModelError, match="cannot be captured while it generates .*over the whole text"):
        loaded(model_of("llama"))


def test_steps_at_other_positions_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = model_of("llama")
    honest = model.prepare_inputs_for_generation

    def shifted(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = honest(*args, **kwargs)
        if inputs["input_ids"].shape[1] == 1:
            inputs["position_ids"] = inputs["position_ids"] + 1
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", shifted)
    with pytest.raises(UnsupportedModelError, match="cannot be captured while it generates"):
        loaded(model)


def test_where_padding_has_a_say_prompts_of_one_length_share_a_batch(monkeypatch: pytest.MonkeyPatch):
    model = model_of("llama")
    honest = model.prepare_inputs_for_generation

    def deaf(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = honest(*args, **kwargs)
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", deaf)
    assert not loaded(model).pads


@pytest.mark.skipif(
    not hasattr(GenerationMixin, "_prepare_static_cache"), reason="this transformers prepares otherwise"
)
def test_another_cache_or_chunk_than_the_one_that_is_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = model_of("llama")
    monkeypatch.setattr(model, "_prepare_static_cache", lambda **_: DynamicCache())
    told = "generate.cache=static: LlamaForCausalLM is given DynamicCache all the same"
    with pytest.raises(UnsupportedModelError, match=told):
        loaded(model, Caching("static"))
    honest = type(model)._prefill

    def at_once(self: Any, ids: Any, how: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        how.prefill_chunk_size = None
        return honest(self, ids, how, *args, **kwargs)

    monkeypatch.setattr(type(model), "_prefill", at_once)
    told = "generate.prefill_chunk_size: prompts go through LlamaForCausalLM 11 tokens at a time all the same"
    with pytest.raises(UnsupportedModelError, match=told):
        loaded(model, Caching(chunk=2))


@pytest.mark.parametrize("caching", [Caching("static", chunk=5), Caching("quantized", "fp8")])
def test_a_proof_leaves_the_cache_as_it_is_asked_for(caching: Caching):
    if not FP8:
        pytest.skip("this transformers has no fp8 cache, or takes no chunks")
    ours = loaded(model_of("deepseek_v3"), caching)
    assert ours.pads and ours.caching == caching
    assert cache_utils.Fp8QuantizedLayer()._quantize(torch.tensor([1.03]))[0].dtype == torch.float8_e4m3fn


def test_models_that_do_not_write_are_refused():
    with pytest.raises(UnsupportedModelError, match="is an encoder and a decoder"):
        check_writes(tiny_config("t5"), "some t5")
    with pytest.raises(UnsupportedModelError, match="has no head"):
        check_writes(tiny_config("siglip_vision_model"), "a tower")
    model = model_of("llama")
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no head"):
        check_writes_now(find_backbone(model))
