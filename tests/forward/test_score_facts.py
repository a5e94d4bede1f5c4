"""What logits are made of, as a probe finds it: against configs, parameters, and formulas written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models.loaded import LoadedBackbone

from sniffer.forward.attention.facts import formula_slopes, score_facts
from sniffer.forward.attention.prove import PROBE_TOKENS
from sniffer.types import LayerGeometry, first_key
from tests.forward.test_attention import backbone_of
from tests.helpers_attention import batch_of, captured
from tests.tiny_families import tiny_ids


def test_a_plain_layer():
    scaling, facts = score_facts(backbone_of("llama"))[0]
    assert scaling == pytest.approx(16**-0.5) and facts.as_json() == {
        "softcap": None,
        "sinks": None,
        "alibi": None,
        "missing": "",
    }


def test_a_soft_cap_and_the_scale_of_a_config():
    scaling, facts = score_facts(backbone_of("gemma2", "eager", attn_logit_softcapping=3.0))[1]
    assert facts.softcap == 3.0 and scaling == pytest.approx(256**-0.5) and not facts.missing


def test_sinks_are_the_parameters():
    backbone = backbone_of("gpt_oss", "eager")
    for layer, (_, facts) in score_facts(backbone).items():
        sinks = list(backbone.layer_of)[layer].sinks.detach().numpy()
        assert facts.sinks == pytest.approx(sinks) and not facts.missing


def test_slopes_of_alibi():
    """2^(-8 h / heads) of head h from 1 (Press et al., 2022). MPT counts keys from the text's end."""
    wanted = [2.0 ** (-8 * head / 4) for head in range(1, 5)]
    scaling, facts = score_facts(backbone_of("bloom", "eager"))[0]
    assert scaling == 16**-0.5 and facts.alibi == pytest.approx(wanted, rel=1e-6) and not facts.missing
    _, other = score_facts(backbone_of("mpt", "eager"))[0]
    assert other.alibi == pytest.approx(wanted, rel=1e-5)
    assert other.missing == "it adds a constant to all logits of a query"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_a_probe_is_no_part_of_slopes(dtype: torch.dtype):
    """A thousandth more of a slope would be a whole unit of a logit in a text of 4,000 tokens."""
    backbone = backbone_of("bloom", "eager")
    halved = LoadedBackbone(backbone.module.to(dtype))
    for scaling, facts in score_facts(halved).values():
        assert facts.alibi == tuple(2.0 ** (-8 * head / 4) for head in range(1, 5)) and scaling == 0.25
        assert not facts.missing


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 71])
def test_slopes_by_formula_are_those_of_a_family(heads: int):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    wanted = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)[:, 0, 1]
    assert formula_slopes(heads) == pytest.approx(wanted.numpy(), rel=1e-6)


def test_slopes_that_are_rounded_in_long_texts_are_no_line():
    """Falcon keeps what it adds in bfloat16, whatever the model's dtype."""
    facts = score_facts(backbone_of("falcon", alibi=True, max_position_embeddings=4096))
    assert all("rounded" in one.missing and one.alibi for _, one in facts.values())
    assert all(not one.missing for _, one in score_facts(backbone_of("falcon")).values())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_mask_ends_where_the_dtype_does(family: str):
    backbone = LoadedBackbone(backbone_of(family, "eager").module.to(torch.float16))
    assert [one.missing for _, one in score_facts(backbone).values()] == [""] * 4


def test_a_scale_that_no_call_names():
    """GPT-Neo multiplies nothing in, falcon divides by the root of the dimension in its own code."""
    neo, falcon = backbone_of("gpt_neo", "eager"), backbone_of("falcon")
    assert neo.geometry[0].scaling is falcon.geometry[0].scaling is None
    assert [scaling for scaling, _ in score_facts(neo).values()] == [1.0] * 4
    assert [scaling for scaling, _ in score_facts(falcon).values()] == [falcon.geometry[0].dims["q"] ** -0.5] * 4


@pytest.mark.parametrize(
    ("family", "why"), [("deepseek_v32", "keys that they choose"), ("doge", "keys that they choose")]
)
def test_keys_that_queries_choose_are_no_window(family: str, why: str):
    backbone = backbone_of(family)
    assert all(layer.selects and not layer.full for layer in backbone.geometry)
    assert all(why in facts.missing for _, facts in score_facts(backbone).values())


def test_what_cannot_be_looked_at_says_so():
    facts = score_facts(backbone_of("granite_swa", "eager"))
    assert all("is not what it returned" in one.missing for _, one in facts.values())


def test_the_keys_of_a_window_and_of_a_chunk():
    positions = np.arange(10)
    assert first_key(positions, None).tolist() == [0] * 10
    assert first_key(positions, 4).tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert first_key(positions, 4, chunked=True).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("family", "changes", "chunked"),
    [("llama4_text", {"attention_chunk_size": 6}, True), ("mistral", {"sliding_window": 6}, False)],
)
def test_a_layer_sees_what_its_geometry_says(family: str, changes: dict[str, Any], chunked: bool):
    """Llama 4's chunks lie side by side; taken for a look-back, they would be wrong at nearly every position."""
    backbone = backbone_of(family, **changes)
    found = captured(backbone, batch_of(tiny_ids(batch=1)), statistics=("mass",))
    assert {layer.chunked for layer in backbone.geometry if layer.sliding_window} == {chunked}
    for layer in backbone.geometry:
        begin = layer.first_key(np.arange(24))
        wanted = (np.arange(24) <= np.arange(24)[:, None]) & (np.arange(24) >= begin[:, None])
        assert ((found[layer.layer]["mass"] > 0).all(1) == wanted).all()
    assert all(not facts.missing for _, facts in score_facts(backbone).values()) and PROBE_TOKENS > 6


def test_a_probe_that_fails_costs_no_run():
    class Broken:
        geometry = (LayerGeometry(0, "layers.0", {"q": 1}, {"q": 2}, 0.5, None),)
        vocabulary, device, layer_of = 9, torch.device("cpu"), {}

        def __call__(self, ids: torch.Tensor) -> None:
            raise ValueError("no such input")

    ((scaling, facts),) = score_facts(Broken()).values()
    assert scaling == 0.5 and facts.missing == "a probe of its logits failed: ValueError: no such input"
