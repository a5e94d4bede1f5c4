"""RoPE as the manifest tells it: the frequencies of formulas worked out here, and those that turn q_pre into q."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil, floor, log, pi
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.tap import Seen, tap
from sniffer.types import Rope, by_rope
from tests.forward.test_attention import backbone_of
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

DIM, THETA = 8, 1e4
PLAIN = THETA ** (-np.arange(0, DIM, 2) / DIM)
"""Su et al., 2021, section 3.2.2."""


def llama3(factor: float, low: float, high: float, original: int) -> np.ndarray:
    """Long waves are stretched, short ones are not, those between by a line over how often they turn."""
    turns = original * PLAIN / (2 * pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return share * PLAIN + (1 - share) * PLAIN / factor


def yarn(factor: float, original: int, fast: float = 32, slow: float = 1) -> np.ndarray:
    """Peng et al., 2023, section 3.2; the line is over dimensions between those that turn `fast` and `slow` times."""
    first, last = (DIM * log(original / (2 * pi * turns)) / (2 * log(THETA)) for turns in (fast, slow))
    first, last = max(floor(first), 0), min(ceil(last), DIM - 1)
    share = np.clip((np.arange(DIM // 2) - first) / (last - first), 0, 1)
    return (1 - share) * PLAIN + share * PLAIN / factor


CASES: dict[str, tuple[dict[str, Any], np.ndarray, float]] = {
    "default": ({}, PLAIN, 1.0),
    "linear": ({"factor": 4.0}, PLAIN / 4, 1.0),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        llama3(8, 1, 4, 64),
        1.0,
    ),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 256}, yarn(4, 256), 0.1 * log(4) + 1),
}


@pytest.mark.parametrize("kind", CASES)
def test_frequencies_are_those_of_the_formula_and_of_the_vectors(run: Callable, kind: str):
    parameters, wanted, factor = CASES[kind]
    told = {"rope_type": kind, "rope_theta": THETA, **parameters}
    captured: Run = run(
        f"model.config_overrides={{rope_parameters: {json.dumps(told).replace(chr(34), '')}}}",
        "sampler=all",
        "capture.kinds=[q,k,q_pre,k_pre]",
    )
    (entry,) = captured.manifest.rope
    assert entry["layers"] == [0, 1] and entry["parameters"].items() >= told.items()
    for layer in (0, 1):
        rope = captured.rope(layer)
        assert np.allclose(rope.inv_freq, wanted, rtol=1e-6)
        assert rope.attention_factor == pytest.approx(factor) and rope.rotary == DIM
        for kind_ in ("q", "k"):
            before, after = (captured.vectors(layer=layer, head=1, kind=one) for one in (f"{kind_}_pre", kind_))
            x, y = (one.vectors[:, :4] + 1j * one.vectors[:, 4:].astype(np.float64) for one in (before, after))
            assert before.positions.max() > 500 and (before.positions == after.positions).all()
            turned = factor * x * np.exp(1j * before.positions[:, None] * wanted)
            assert np.abs(turned - y).max() < 2e-4 * np.abs(y).max()  # angles are computed in float32
            found = rope.turned(before.vectors, before.positions)
            assert np.allclose(found, np.concatenate([turned.real, turned.imag], axis=1), atol=2e-4)
            rotary, moved = (
                captured.rotary(layer),
                factor * x * np.exp(1j * (before.positions[:, None] + 1000) * wanted),
            )
            assert rotary.proven == ("q", "k")
            found = rotary.turned(before.vectors, before.positions + 1000)
            assert np.allclose(found, np.concatenate([moved.real, moved.imag], axis=1), atol=2e-3)
            assert np.allclose(rotary.before(after.vectors, after.positions), before.vectors, atol=2e-4)
    assert captured.model_config["rope_parameters"].items() >= told.items()


def test_pairs_lie_as_the_layout_says():
    x, p, w = np.arange(12.0).reshape(1, 12), np.array([3]), (0.5, 0.1)
    c, s = np.cos(3 * np.array(w)), np.sin(3 * np.array(w))

    def by_hand(pairs: list[tuple[int, int]], places: list[tuple[int, int]]) -> np.ndarray:
        out = x[0].copy()
        for f, ((a, b), (i, j)) in enumerate(zip(pairs, places, strict=True)):
            out[i], out[j] = 2 * (x[0, a] * c[f] - x[0, b] * s[f]), 2 * (x[0, a] * s[f] + x[0, b] * c[f])
        return out

    half, beside = [(4, 6), (5, 7)], [(4, 5), (6, 7)]
    for layout, pairs, places in (
        ("half", half, half),
        ("interleaved", beside, beside),
        ("interleaved_to_half", beside, half),
    ):
        rope = Rope(w, layout, first=4, attention_factor=2.0)
        assert np.allclose(rope.turned(x, p)[0], by_hand(pairs, places))
    assert (Rope().turned(x, p) == x).all()


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("gpt_neox", {}, "half 4 of 16 from 0"),
        ("glm4", {}, "interleaved 8 of 16 from 0"),
        ("gptj", {}, "interleaved 8 of 16 from 0"),
        ("deepseek_v3", {}, "interleaved_to_half 64 of 192 from 128"),
        ("llama4_text", {}, "interleaved 16 of 16 from 0, half 0 of 16 from 0"),
        ("bloom", {}, "half 0 of 16 from 0"),
    ],
)
def test_families_turn_what_they_turn(family: str, changes: dict[str, Any], wanted: str):
    backbone = backbone_of(family, "eager" if family == "bloom" else "sdpa", **changes)
    dims = {layer.layer: layer.dims["q"] for layer in backbone.geometry}
    told = [f"{one.layout} {one.rotary} of {dims[layer]} from {one.first}" for layer, one in backbone.rope.items()]
    assert ", ".join(dict.fromkeys(told)) == wanted and not any(one.missing for one in backbone.rope.values())
    events: list[Seen] = []
    ids = tiny_ids(batch=1, seq=100)
    with torch.inference_mode(), tap(events.append, pre=True):
        backbone(ids)
    for event in events:
        rope = backbone.rope[backbone.layer_of[event.module]]
        for before, after in ((event.q_pre, event.q), (event.k_pre, event.k)):
            assert before is not None
            found = rope.turned(before.double().numpy(), np.arange(100))
            assert np.abs(found - after.numpy()).max() < 1e-4 * float(after.abs().max())


def test_layers_of_two_types_have_each_its_own():
    backbone = backbone_of("gemma3_text")
    told = {one.layer_type: (one.parameters["rope_theta"], one.inv_freq[1]) for one in backbone.rope.values()}
    dim = backbone.geometry[0].dims["q"]
    for theta, kind in ((1e4, "sliding_attention"), (1e6, "full_attention")):
        assert told[kind] == (theta, pytest.approx(theta ** (-2 / dim), rel=1e-6))
    entries = by_rope(backbone.rope)
    assert [entry["layers"] for entry in entries] == [[0, 2], [1, 3]]
    assert Rope.from_json(json.loads(json.dumps(entries[1]))) == backbone.rope[1]


def test_what_turns_otherwise_in_longer_texts_says_until_where():
    dynamic = {"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0}
    assert {one.until for one in backbone_of("llama", rope_parameters=dynamic).rope.values()} == {128}
    assert {one.until for one in backbone_of("llama").rope.values()} == {None}


def test_what_is_not_shown_is_not_told(run: Callable):
    """A norm after RoPE: what turns is not what attention receives."""
    ropes = backbone_of("hunyuan_v1_dense").rope
    assert all("no frequencies that it keeps give" in one.missing and not one.inv_freq for one in ropes.values())
    captured: Run = run("dataset.max_examples=1")
    entry = {**captured.manifest.rope[0], "missing": "somehow"}
    object.__setattr__(captured.manifest, "rope", (entry,))
    with pytest.raises(RunError, match="not known: somehow"):
        captured.rope(0)
    object.__setattr__(captured.manifest, "rope", ())
    with pytest.raises(RunError, match="did not tell of RoPE: capture it anew"):
        captured.rope(1)
    for wrong in ({"layout": "spiral"}, {"first": 1}):
        object.__setattr__(captured.manifest, "rope", ({**entry, "missing": "", **wrong},))
        with pytest.raises(RunError, match="cannot turn: install a newer"):
            captured.rope(1)
    with pytest.raises(RunError, match="layer 7 was not captured"):
        captured.rope(7)


def test_a_buffer_that_is_not_the_layers_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch):
    """Frequencies that lie about in a module and turn nothing."""
    from sniffer.models import rope as rope_module

    honest = rope_module.kept

    def other(module: torch.nn.Module):
        for one in honest(module):
            yield rope_module.Frequencies(tuple(1.01 * w for w in one.inv_freq), one.factor, one.layer_type)

    monkeypatch.setattr(rope_module, "kept", other)
    assert all(one.missing for one in backbone_of("llama").rope.values())


def test_a_search_that_fails_costs_no_run(monkeypatch: pytest.MonkeyPatch):
    from sniffer.models import rope as rope_module

    def broken(module: torch.nn.Module):
        raise TypeError("no number")

    monkeypatch.setattr(rope_module, "kept", broken)
    ropes = backbone_of("llama").rope
    assert list(ropes) == [0, 1, 2, 3]
    assert {one.missing for one in ropes.values()} == {"looking for it failed: TypeError: no number"}


def test_coarse_numbers_tell_frequencies_apart_by_the_factor():
    """A yarn model keeps its frequencies twice, with its attention factor and without: in bfloat16 either is near."""
    told = {"rope_type": "yarn", "rope_theta": THETA, **CASES["yarn"][0]}
    model = tiny_model(tiny_config("llama", rope_parameters=told))
    ropes = LoadedBackbone(find_backbone(model.bfloat16())).rope.values()
    assert all(one.attention_factor == pytest.approx(CASES["yarn"][2]) and not one.missing for one in ropes)
