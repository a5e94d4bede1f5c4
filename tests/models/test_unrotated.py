"""The pre kinds are what attention receives where RoPE is the identity, layer by layer; else they are not to be had."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from sniffer.models import finder
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from sniffer.models.unrotated import _one_way, inputs_of, without_rope

from sniffer.tap import Seen, tap
from tests.tiny_copies import ROTATE, edited, imported, llama_source, model_of, tap_line, write_copy
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

finder.install()

LINE = tap_line(llama_source())
Q_PRE, K_PRE = "query_states__pre if", "key_states__pre if"
TURN = "({0} * cos.unsqueeze(1) + rotate_half({0}) * sin.unsqueeze(1))"
INLINE = f"query_states, key_states = {TURN.format('query_states')}, {TURN.format('key_states')}"
OWN_ANGLES = (
    "angles = torch.arange(query_states.shape[2])[:, None] / 100 ** (torch.arange(self.head_dim) / self.head_dim); "
    "cos, sin = angles.cos()[None], angles.sin()[None]; "
)


def source_with(rotation: str, line: str) -> str:
    return edited(ROTATE, rotation).replace(LINE, line)


def shown(backbone: LoadedBackbone) -> list[Seen]:
    seen: list[Seen] = []
    with torch.inference_mode(), tap(seen.append, pre=True):
        backbone(tiny_ids())
    return seen


RIGHT = {
    "by the family's function": source_with(ROTATE, LINE),
    "written out": source_with(INLINE, LINE),
    "rotating nothing": source_with("pass", LINE.replace(Q_PRE, "query_states if").replace(K_PRE, "key_states if")),
}


@pytest.mark.parametrize("right", list(RIGHT))
def test_what_is_right_is_proven_however_rope_is_spelled(tmp_path: Path, right: str):
    write_copy(tmp_path, RIGHT[right])
    with imported(tmp_path) as module:
        backbone = LoadedBackbone(model_of(module))
        assert not backbone.pre_missing and backbone.geometry[0].heads["q_pre"] == 4
        assert torch.equal(shown(backbone)[0].q, shown(backbone)[0].q_pre) == (right == "rotating nothing")


ROTATED = LINE.replace(Q_PRE, "query_states if").replace(K_PRE, "key_states if")
WRONG = {
    "q is rotated": (source_with(ROTATE, LINE.replace(Q_PRE, "query_states if")), "q_pre of layers.0"),
    "k is rotated": (source_with(ROTATE, LINE.replace(K_PRE, "key_states if")), "k_pre of layers.0"),
    "q is scaled": (source_with(ROTATE, LINE.replace(Q_PRE, "1.001 * query_states__pre if")), "q_pre of layers.0"),
    "in one layer": (
        source_with(ROTATE, LINE.replace(Q_PRE, "(query_states, query_states__pre)[self.layer_idx == 0] if")),
        "q_pre of layers.1",
    ),
    "RoPE is written out": (source_with(INLINE, ROTATED), "q_pre of layers.0"),
    "RoPE has angles of its own": (source_with(OWN_ANGLES + INLINE, ROTATED), "q_pre of layers.0"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_what_is_wrong_is_not_to_be_had_and_named(tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture):
    source, complaint = WRONG[wrong]
    write_copy(tmp_path, source)
    with imported(tmp_path) as module, caplog.at_level("WARNING"):
        backbone = LoadedBackbone(model_of(module))
    assert complaint in backbone.pre_missing and complaint in caplog.text
    assert set(backbone.geometry[0].heads) == {"q", "k", "v"}


def test_nan_has_no_direction():
    states = torch.ones(1, 2, 12, 4)
    assert _one_way(states)
    states[0, 1, 10, 2] = torch.nan
    assert not _one_way(states)


@pytest.mark.parametrize(
    "model_type", ["bloom", "smollm3", "llama4_text", "deepseek_v3", "roformer", "gemma3n_text", "gpt2"]
)
def test_derived_families_are_proven(model_type: str):
    """ALiBi, no RoPE, temperatures, latent attention, positions first, shared keys, learned positions."""
    attention = "eager" if model_type in ("bloom", "roformer") else "sdpa"
    model = tiny_model(tiny_config(model_type), attn_implementation=attention)
    assert not LoadedBackbone(find_backbone(model)).pre_missing


def test_a_proof_that_fails_leaves_the_pre_kinds_out(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setattr("sniffer.models.unrotated._first_wrong", broken)
    backbone = LoadedBackbone(find_backbone(tiny_model(tiny_config("llama", num_hidden_layers=1))))
    assert backbone.pre_missing == "without RoPE it fails: RuntimeError: no such kernel"
    assert "q_pre" not in backbone.geometry[0].heads


def test_rope_is_given_back_after_an_error():
    model = tiny_model(tiny_config("llama", num_hidden_layers=1)).model
    llama = __import__(type(model).__module__, fromlist=["_"])
    before = llama.apply_rotary_pos_emb
    with pytest.raises(KeyError), without_rope(model):
        assert llama.apply_rotary_pos_emb is not before
        raise KeyError
    assert llama.apply_rotary_pos_emb is before
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_for_other_threads_rope_stays_as_it_is():
    """A notebook that serves a model of the family while another one is proven."""
    model, ids = tiny_model(tiny_config("llama", num_hidden_layers=2)).model, tiny_ids()

    def output() -> torch.Tensor:
        with torch.inference_mode():
            return model(ids, use_cache=False).last_hidden_state

    before = output()
    with ThreadPoolExecutor(1) as elsewhere, without_rope(model), inputs_of(model.layers) as inputs:
        assert torch.equal(elsewhere.submit(output).result(), before) and not inputs
        assert not torch.equal(output(), before) and len(inputs) == 2


def test_two_threads_may_prove_models_of_one_family_at_once():
    models = [tiny_model(tiny_config("llama", num_hidden_layers=1)).model for _ in range(2)]
    llama = sys.modules[type(models[0]).__module__]
    before, ready = llama.apply_rotary_pos_emb, Barrier(2)

    def prove(model: Any) -> None:
        ready.wait()
        for _ in range(20):
            with without_rope(model):
                pass

    with ThreadPoolExecutor(2) as both:
        list(both.map(prove, models))
    assert llama.apply_rotary_pos_emb is before
