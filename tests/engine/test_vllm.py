"""engine=vllm, as far as it can be tested without vLLM: what it refuses, and which tokens of its steps are picked."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sniffer.models.backbone import Checkpoint

from sniffer.config.schema import EngineConfig
from sniffer.engine.vllm.before import before_rope, known_before
from sniffer.engine.vllm.request import check_vllm
from sniffer.engine.vllm.seam import first_head
from sniffer.engine.vllm.steps import Steps
from sniffer.errors import CaptureError, ConfigError
from sniffer.forward.generation.live import ROW
from sniffer.forward.generation.request import GenerateConfig
from sniffer.forward.selection import CaptureConfig
from sniffer.types import ROPE_LAYOUTS, LayerGeometry, Rope

MODEL = Checkpoint("embedded:SmolLM2-135M-Instruct")


ASKED = {"capture": CaptureConfig(), "model": MODEL, "generate": None}
"""What `check_vllm` looks at, of a run that can be had."""


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("capture.attention", {"capture": CaptureConfig(attention="lse")}),
        ("generate.live=both", {"generate": GenerateConfig(live="both")}),
        ("generate.cache=static", {"generate": GenerateConfig(cache="static")}),
        ("generate.prefill_chunk_size=7", {"generate": GenerateConfig(prefill_chunk_size=7)}),
        ("model.weights=random", {"model": replace(MODEL, weights="random", model_type="llama")}),
        ("model.compile=True", {"model": replace(MODEL, compile=True)}),
        ("model.config_overrides", {"model": replace(MODEL, config_overrides={"rope_theta": 1.0})}),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(named: str, changes: dict[str, Any]):
    check_vllm(SimpleNamespace(**ASKED))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=named) as told:
        check_vllm(SimpleNamespace(**ASKED | changes))  # type: ignore[arg-type]
    assert "engine=local" in str(told.value)


def test_keys_of_another_engine_are_refused():
    with pytest.raises(ConfigError, match=r"engine\.kv_cache is for engine=vllm"):
        EngineConfig(kv_cache="8GiB")


def texts(lengths: dict[str, int]) -> dict[str, np.ndarray]:
    """A number for each token of each request, which says where it is."""
    return {name: 1000.0 * row + np.arange(n) for row, (name, n) in enumerate(lengths.items())}


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.dictionaries(st.text("abc", min_size=1), st.integers(1, 12), min_size=1))
def test_picked_tokens_are_kept_once_however_vllm_schedules(random: Random, lengths: dict[str, int]):
    """Steps of random pieces, in random order, with requests that are put back to their first token."""
    rows = {name: row for row, name in enumerate(lengths)}
    every = {(layer, side): [] for layer in (0, 3) for side in ("q", "k")}
    for picked in every.values():
        picked += [row * ROW + p for name, row in rows.items() for p in range(lengths[name]) if random.random() < 0.5]
    places = {pair: np.array(picked, dtype=np.int64) for pair, picked in every.items()}
    steps, values, at = Steps(rows, places), texts(lengths), dict.fromkeys(lengths, 0)
    while left := [name for name in lengths if at[name] < lengths[name]]:
        now = random.sample(left, random.randint(1, len(left)))
        counts = [random.randint(1, lengths[name] - at[name]) for name in now]
        steps.begin(now, np.array([at[name] for name in now]), np.array(counts))
        flat = np.concatenate([values[name][at[name] : at[name] + n] for name, n in zip(now, counts, strict=True)])
        states = torch.from_numpy(np.stack([flat, -flat], 1))
        for layer, kind in every:
            steps.keep(layer, kind, states, torch.tensor([1]) if kind == "k" else None, 2)
        at = {name: at[name] + dict(zip(now, counts, strict=True)).get(name, 0) for name in lengths}
        if random.random() < 0.2:
            at[random.choice(now)] = 0
        if random.random() < 0.02:
            break
    else:
        found = steps.taken(list(every), places)
        for (layer, kind), wanted in places.items():
            tokens = torch.from_numpy(1000.0 * (wanted // ROW) + wanted % ROW)
            kept = -tokens[:, None] if kind == "k" else torch.stack([tokens, -tokens], 1)
            assert not len(wanted) or torch.equal(found[layer, kind], kept)
        assert steps.reached.tolist() == list(lengths.values())


def test_tokens_that_are_never_computed_are_an_error():
    steps = Steps({"a": 0}, {(0, "q"): np.array([0, 5])})
    with pytest.raises(CaptureError, match="goes on at position 3"):
        steps.begin(["a"], np.array([3]), np.array([4]))
    steps.begin(["a"], np.array([0]), np.array([4]))
    steps.keep(0, "q", torch.zeros(4, 2), None, 1)
    with pytest.raises(CaptureError, match="has not shown its q of every picked token"):
        steps.taken([(0, "q")], {(0, "q"): np.array([0, 5])})
    with pytest.raises(CaptureError, match="no request of this run"):
        steps.begin(["b"], np.array([0]), np.array([1]))


@pytest.mark.parametrize(
    ("ranks", "own", "total", "wanted"),
    [(2, 4, 8, [(0, True), (4, True)]), (4, 1, 2, [(0, True), (0, False), (1, True), (1, False)])],
)
def test_heads_of_ranks_are_numbered_as_in_the_whole_model(ranks: int, own: int, total: int, wanted: list[Any]):
    assert [first_head(rank, ranks, own, total) for rank in range(ranks)] == wanted


@pytest.mark.parametrize("layout", ROPE_LAYOUTS)
def test_q_before_rope_is_q_turned_back(layout: str):
    """Of two heads of 10 dimensions, 6 of them turn and get longer; the witness is RoPE in float64, forth."""
    rope = Rope((1.0, 0.3, 0.01), layout, first=2, attention_factor=1.25)
    before = np.random.default_rng(0).normal(size=(2, 5, 10))
    positions = np.array([0, 3, 17, 900, 2])
    after = torch.from_numpy(rope.turned(before, positions)).transpose(0, 1).flatten(1)
    places = np.arange(5) * ROW + positions
    found = before_rope(after.float(), places, 10, rope)
    assert torch.allclose(found.view(5, 2, 10).transpose(0, 1).double(), torch.from_numpy(before), atol=1e-4)
    assert before_rope(after.bfloat16(), places, 10, rope).dtype == torch.bfloat16
    assert torch.equal(before_rope(after, places, 10, Rope()), after)


def test_q_before_rope_is_not_shown_where_rope_is_not_known():
    sizes = dict.fromkeys(("q", "k", "v", "q_pre", "k_pre"), 4)
    layers = [LayerGeometry(number, "", sizes, sizes, None, None) for number in (0, 1)]
    found, why = known_before(layers, {0: Rope((1.0,)), 1: Rope(missing="it turns by colour")}, "")
    assert [tuple(one.heads) for one in found] == [tuple(sizes), ("q", "k", "v")]
    assert "it turns by colour" in why
