"""Causal is what lets no token have a say in earlier ones: not what is noisy, and not what is merely small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sniffer.models import causality, finder, sight
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoConfig, AutoModel, PreTrainedModel

from sniffer.errors import UnsupportedModelError
from tests.tiny_families import tiny_config, tiny_model

finder.install()

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def initial(model_type: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """As transformers draws it: attention then hardly moves anything."""
    small = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    ids = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")} if model_type == "modernbert" else {}
    config = AutoConfig.for_model(model_type, **small, **ids, vocab_size=128)
    torch.manual_seed(0)
    return AutoModel.from_config(config, dtype=dtype, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "electra"])
def test_small_weights_do_not_make_an_encoder_causal(model_type: str, dtype: torch.dtype, attention: str):
    with pytest.raises(UnsupportedModelError, match="not causal: .* later tokens"):
        LoadedBackbone(find_backbone(initial(model_type, dtype, attention)))


class Ahead(nn.Module):
    """Adds a little of the next token's states: something that is no attention mixes tokens."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states) + self.share * states.roll(-1, 1)


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-5])
def test_what_is_no_attention_and_looks_ahead_is_found_however_little_it_does(share: float):
    model = tiny_model(tiny_config("llama"))
    model.model.layers[1].mlp = Ahead(model.model.layers[1].mlp, share)
    with pytest.raises(UnsupportedModelError, match="a later token changes LlamaAttention"):
        LoadedBackbone(find_backbone(model))


def rounded_anew(model: nn.Module, level: float, seed: int, *, share: float = 1.0) -> list[float]:
    """Has experts round by who is in the batch with whom, as products do that are cut by expert.

    Args:
        level: of the noise, over the largest value that an expert gives.
        share: of the tokens that it meets.

    Returns:
        The levels that were added, one for each call.
    """
    added: list[float] = []

    def noise(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        chosen = next(one for one in args[1:] if isinstance(one, Tensor) and not one.is_floating_point())
        generator = torch.Generator().manual_seed(hash((seed, *_sizes(chosen))))
        drawn = torch.randn(output.shape, generator=generator)
        met = torch.rand(output.shape[:-1], generator=generator) < share
        added.append(level)
        return output + (level * output.float().abs().max() * drawn * met[..., None]).to(output.dtype)

    for part in model.modules():
        if type(part).__name__.endswith("Experts"):
            part.register_forward_hook(noise)
    return added


def _sizes(chosen: Tensor) -> tuple[int, ...]:
    """How many tokens each expert has."""
    return tuple(chosen.flatten().bincount().tolist())


@HALF
@pytest.mark.parametrize(("level", "share"), [(0.004, 1.0), (0.05, 1.0), (0.15, 1.0), (0.3, 0.1)])
def test_experts_that_round_by_their_batch_are_no_reason_to_refuse(dtype: torch.dtype, level: float, share: float):
    for seed in range(3):
        model = tiny_model(tiny_config("qwen3_moe"), seed).to(dtype)
        added = rounded_anew(model, level, seed, share=share)
        assert len(LoadedBackbone(find_backbone(model)).geometry) == 4 and added


@HALF
def test_noise_hides_no_attention_to_later_tokens(dtype: torch.dtype):
    model = tiny_model(tiny_config("qwen3_moe")).to(dtype)
    rounded_anew(model, 0.3, 0)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="not causal: .* is given later tokens"):
        LoadedBackbone(find_backbone(model))


@HALF
def test_noise_hides_nothing_else_that_looks_ahead_by_more_than_it(dtype: torch.dtype):
    model = tiny_model(tiny_config("qwen3_moe")).to(dtype)
    rounded_anew(model, 0.01, 0)
    model.model.layers[0].input_layernorm = Ahead(model.model.layers[0].input_layernorm, 0.5)
    with pytest.raises(UnsupportedModelError, match="a later token changes Qwen3MoeAttention"):
        LoadedBackbone(find_backbone(model))


def test_a_dense_model_is_asked_once_and_by_one_more_forward(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(causality, "_sticks_out", lambda *arguments: pytest.fail("there is no noise"))
    for model_type in ("llama", "gpt2", "bloom", "gemma3_text"):
        attention = "eager" if model_type == "bloom" else "sdpa"
        LoadedBackbone(find_backbone(tiny_model(tiny_config(model_type), attn_implementation=attention)))


def test_a_change_is_counted_where_a_number_was_or_becomes_nan():
    before, after = torch.ones(1, 2, 4, 3), torch.ones(1, 2, 4, 3)
    before[0, 0, 0], after[0, 0, 0] = torch.nan, torch.nan
    after[0, 1, 1] = torch.nan
    before[0, 1, 2], after[0, 1, 2] = torch.inf, torch.inf
    assert causality._change(before, after).tolist() == [[0, torch.inf, 0, 0]]
    after[0, 0, 3] = 1.5
    assert causality._change(before, after).tolist() == [[0, torch.inf, 0, 0.5]]


Q = torch.zeros(1, 2, 5, 4)
LOWER = torch.ones(5, 5, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("more", "later"),
    [
        ({"is_causal": True}, False),
        ({}, True),
        ({"attn_mask": LOWER}, False),
        ({"attn_mask": ~LOWER}, True),
        ({"attn_mask": torch.zeros(1, 1, 5, 5).masked_fill(~LOWER, -1e4)}, False),
        ({"attn_mask": torch.zeros(1, 2, 5, 5).masked_fill(~LOWER, -torch.inf)}, False),
        ({"attn_mask": torch.arange(25.0).view(5, 5).masked_fill(~LOWER, torch.finfo(torch.float16).min)}, False),
        ({"attn_mask": torch.zeros(5, 5)}, True),
        ({"attn_mask": LOWER.float().masked_fill(~LOWER, -3.0)}, True),
    ],
)
def test_torch_s_own_attention_says_what_it_is_given(more: dict[str, Any], later: bool):
    seen = sight.of_sdpa((), Q, Q, Q, **more)
    assert seen is not None and (seen.later, seen.tokens, seen.certain) == (later, 5, True)


def test_attention_over_something_else_says_nothing():
    assert sight.of_sdpa((), Q, Q[:, :, :4], Q) is None
    assert sight.of_weights((), torch.zeros(2, 5, 5)) is None
    assert sight.of_arguments("paged", nn.Module(), Q, Q, {}) is None


def flagged(is_causal: bool | None) -> nn.Module:
    module = nn.Module()
    if is_causal is not None:
        module.is_causal = is_causal
    return module


@pytest.mark.parametrize(
    ("module", "named", "later"),
    [
        (flagged(True), {}, False),
        (flagged(False), {}, True),
        (flagged(True), {"is_causal": False}, True),
        (flagged(None), {}, None),
    ],
)
def test_flash_attention_is_known_by_its_flag(module: nn.Module, named: dict[str, Any], later: bool | None):
    seen = sight.of_arguments("flash_attention_2", module, Q, Q, named)
    assert (None if seen is None else seen.later) is later


@pytest.mark.parametrize("later", [True, False])
def test_flex_attention_is_known_by_its_rule(later: bool):
    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) | torch.tensor(later)

    mask = create_block_mask(rule, 1, None, 5, 5, device="cpu")
    seen = sight.of_arguments("flex_attention", nn.Module(), Q, Q, {"attention_mask": mask})
    assert seen is not None and seen.later is later


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield
