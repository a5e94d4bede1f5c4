"""Live capture is what attention is given while transformers generates, as a process without us saw it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder
from sniffer.models.language_model import LoadedLanguageModel
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone

import sniffer
from sniffer.errors import CaptureError
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.attention import steps
from sniffer.forward.attention.attending import AttentionPlan
from sniffer.forward.attention.prove import prove
from sniffer.forward.generation import attention as step_attention
from sniffer.forward.generation.live import Live
from sniffer.forward.generation.request import Continuing, GenerateConfig
from sniffer.forward.generation.session import Generation
from sniffer.forward.passes import Passes
from sniffer.forward.selection import CaptureConfig, select
from sniffer.process.clock import Clock
from sniffer.sampler import All, LogUniform, Sampler, picker_of
from sniffer.tap import TAP
from sniffer.types import (
    ALL_STATISTICS,
    ATTENTION,
    KINDS,
    Answer,
    AttentionLayout,
    Document,
    Rows,
    Sections,
    TokenBatch,
)
from tests.helpers_attention import TOP, differences, from_weights
from tests.models.generation_witness import (
    CACHES,
    FP8,
    INLINE,
    NEW,
    PACKAGED,
    PROMPTS,
    TOGETHER,
    WEIGHED,
    WINDOW,
    model_of,
)
from tests.tiny_families import tiny_model

finder.install()

FAMILIES = (
    *("llama", "mistral", "gemma2", "gemma3_text", "gemma3n", "gemma4_text", "qwen3", "gpt_oss", "deepseek_v3"),
    *("lfm2", "granitemoehybrid", "phi3", "cohere2", "llama4_text", "olmo3", "exaone4", "smollm3", "qwen3_next"),
)
"""With sliding windows and hybrid caches, chunks, latent attention, shared keys, sinks, convolutions, state spaces; one
(gemma3n) is within a model that sees and hears, as its checkpoints have it.
"""

FULL = ("llama", "qwen3", "deepseek_v3", "phi3", "smollm3")
"""Those whose layers all have full attention, which caches that quantise are for."""

ROOT = Path(__file__).parents[2]


def seen_by_witness(place: Path, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    out = place / "seen.npz"
    command = [sys.executable, "-m", "tests.models.generation_witness", str(out), *wanted]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return dict(np.load(out))


QUICK = ("static-sevens:mistral", *(["fp8:llama"] if FP8 else []))
"""Caches of which every run of the tests sees a little."""


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return seen_by_witness(tmp_path_factory.mktemp("witness"), [*FAMILIES, *QUICK])


@pytest.fixture(scope="module")
def inline_witness(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Of families that attend in a layer's own code."""
    return seen_by_witness(tmp_path_factory.mktemp("inline"), INLINE)


Captured = dict[tuple[int, str], tuple[Rows, np.ndarray]]
"""By layer and kind, where rows are from, and vectors (rows, heads, dim)."""


def captured(
    family: str,
    *,
    sampler: Sampler,
    prompts: tuple[list[int], ...] = PROMPTS,
    kinds: tuple[str, ...] = KINDS[:3],
    **how,
) -> tuple[LoadedBackbone, Captured]:
    """What is captured of prompts, which are documents 0, 1, ... in this order; side by side, if they may be."""
    model = model_of(family)
    backbone = LoadedBackbone(find_backbone(model))
    selection = select(backbone.geometry, CaptureConfig(list(kinds)), backbone.pre_missing)
    picker, rows = picker_of(sampler, 0), Accumulator(selection)
    passes = Passes(backbone, selection, rows, Clock())
    plan = Continuing(GenerateConfig(**{"max_new_tokens": NEW, **how}), (), Answer())
    language = LoadedLanguageModel(model, backbone, plan.how.caching)
    generation = Generation(language, plan, passes, picker, selection, backbone.lengths, lambda ids: "")
    documents = [
        Document(n, f"doc-{n}", np.array(ids, np.int32), False, sections=Sections.one("prompt", len(ids)))
        for n, ids in enumerate(prompts)
    ]
    for some in [documents] if language.pads else [[document] for document in documents]:
        generation.run(TokenBatch(tuple(some), 0), {})
        assert len(list(passes.settle())) == 1 and TAP.observer is None
    found: Captured = {}
    for layer in backbone.geometry:
        for kind in kinds:
            columns = rows.columns(layer.layer, kind, layer.dims[kind])
            order = columns.rows.order
            nothing = torch.empty(0, len(columns.heads) * layer.dims[kind])
            vectors = torch.cat([nothing, *columns.vectors]).view(len(columns), len(columns.heads), layer.dims[kind])
            found[layer.layer, kind] = columns.rows[order], vectors.numpy()[order]
    return backbone, found


@pytest.mark.parametrize("family", [*FAMILIES, *QUICK])
def test_live_vectors_are_those_that_transformers_attends_with(family: str, witness: dict[str, np.ndarray]):
    cache, _, name = family.rpartition(":")
    backbone, found = captured(name, sampler=All(), **asked(cache))
    layers = sorted(layer.layer for layer in backbone.geometry)
    assert f"{family}/0/{len(layers) - 1}/q" in witness and f"{family}/0/{len(layers)}/q" not in witness
    for (layer, kind), (rows, vectors) in found.items():
        for document, prompt in enumerate(PROMPTS):
            mine, n = rows.example_id == document, len(prompt) + NEW
            place = np.argsort(rows.position[mine])
            assert rows.position[mine][place].tolist() == list(range(n))
            assert rows.token_id[mine][place].tolist() == witness[f"{family}/{document}/ids"].tolist()
            # Its last token goes through no step of transformers'.
            seen = witness[f"{family}/{document}/{layers.index(layer)}/{kind}"].transpose(1, 0, 2)
            ours = vectors[mine][place][:-1]
            assert ours.shape == seen.shape == (n - 1, *ours.shape[1:])
            assert np.linalg.norm(ours - seen) <= 1e-4 * np.linalg.norm(seen - seen.mean(0)) + 1e-6
    assert len(PROMPTS[0]) > WINDOW


@pytest.mark.long
@pytest.mark.parametrize(
    "cache", [cache for cache in CACHES if cache not in PACKAGED and (FP8 or cache not in TOGETHER)]
)
def test_with_each_cache_too(cache: str, tmp_path: Path):
    """Of families with layers that a cache is not for, the others; where another cache shows as much, a few."""
    families = FULL if cache in (*TOGETHER, "static", "all") else FAMILIES
    witness = seen_by_witness(tmp_path, [f"{cache}:{family}" for family in families])
    for family in families:
        test_live_vectors_are_those_that_transformers_attends_with(f"{cache}:{family}", witness)
        if family in WEIGHED:
            test_live_statistics_are_those_of_what_transformers_attends_with(f"{cache}:{family}", witness)


@pytest.mark.long
@pytest.mark.parametrize("family", INLINE)
def test_so_are_those_of_attention_in_a_layers_own_code(family: str, inline_witness: dict[str, np.ndarray]):
    test_live_vectors_are_those_that_transformers_attends_with(family, inline_witness)


def asked(cache: str) -> dict[str, Any]:
    """The keys of `generate` for one of the witness's CACHES."""
    said = CACHES.get(cache, {})
    found = {"cache": said.get("cache_implementation"), "prefill_chunk_size": said.get("prefill_chunk_size")}
    return {**found, "cache_backend": said.get("cache_config", {}).get("backend")}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "lfm2"])
def test_live_and_afterwards_are_the_same_positions_and_vectors(family: str):
    """All kinds, the last token too; the forward over the whole document is that of ordinary runs."""
    backbone = LoadedBackbone(find_backbone(model_of(family)))
    kinds = KINDS if not backbone.pre_missing else KINDS[:3]
    sampler = LogUniform(base_rate=3.0, min_bucket_size=4)
    _, live = captured(family, sampler=sampler, kinds=kinds, live=True)
    _, later = captured(family, sampler=sampler, kinds=kinds, live=False)
    for pair, (rows, vectors) in later.items():
        assert len(rows) and live[pair][0].same(rows)
        assert np.allclose(live[pair][1], vectors, atol=1e-4, rtol=1e-3)


def test_a_prompt_alone_and_beside_others_has_the_same_rows():
    _, together = captured("gemma3_text", sampler=All())
    for document, prompt in enumerate(PROMPTS):
        _, alone = captured("gemma3_text", sampler=All(), prompts=(prompt,))
        for pair, (rows, vectors) in alone.items():
            mine = together[pair][0].example_id == document
            assert together[pair][0][mine].position.tolist() == rows.position.tolist()
            assert np.allclose(together[pair][1][mine], vectors, atol=1e-4, rtol=1e-3)


def test_steps_at_which_nothing_is_wanted_are_not_tapped(monkeypatch: pytest.MonkeyPatch):
    shown, honest = [], Live.__call__

    def noting(self: Live, seen) -> None:
        shown.append(self._step)
        honest(self, seen)

    monkeypatch.setattr(Live, "__call__", noting)
    sampler = LogUniform(base_rate=1.0, min_bucket_size=64)
    backbone, found = captured("llama", sampler=sampler)
    wanted = {
        max(0, position - len(PROMPTS[document]) + 1)
        for rows, _ in found.values()
        for document, position in zip(rows.example_id, rows.position, strict=True)
    }
    assert set(shown) == wanted and len(wanted) < NEW
    assert len(shown) == len(wanted) * len(backbone.geometry)


def test_a_layer_that_shows_other_tokens_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    from sniffer.errors import CaptureError

    honest = Live.__call__

    def shifted(self: Live, seen) -> None:
        honest(self, seen._replace(q=seen.q[:, :, 1:]) if self._step == 0 else seen)

    monkeypatch.setattr(Live, "__call__", shifted)
    with pytest.raises(CaptureError, match=r"shows its q as \(3, 4, 11, .* in a step of 3 x 12 tokens"):
        captured("llama", sampler=All())
    assert TAP.observer is None


ATTENDING = ("llama", "mistral", "gemma2", "gemma3n_text", "gpt_oss", "deepseek_v3", "lfm2", "llama4_text")


@pytest.mark.parametrize("family", ATTENDING)
def test_live_statistics_are_those_of_the_weights_of_the_whole_text(family: str):
    """Of prompts side by side, with windows that caches have forgotten the keys before."""
    plain = find_backbone(tiny_model(model_of(family).config, attn_implementation="eager"))

    def weights_of(document: Document) -> list[np.ndarray]:
        ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            weights = plain(input_ids=ids, use_cache=False, output_attentions=True).attentions
        return [one[0].numpy() for one in weights if one is not None]

    assert_statistics(family, weights_of)


@pytest.mark.parametrize("name", QUICK[:1])
def test_live_statistics_are_those_of_what_transformers_attends_with(name: str, witness: dict[str, np.ndarray]):
    cache, _, family = name.rpartition(":")

    def weights_of(document: Document) -> list[np.ndarray]:
        begin = f"{name}/{document.example_id}"
        assert document.token_ids.tolist() == witness[f"{begin}/ids"].tolist()
        places = (place for place in range(99) if f"{begin}/{place}/weights" in witness)
        return [witness[f"{begin}/{place}/weights"] for place in places]

    assert_statistics(family, weights_of, **asked(cache))


def assert_statistics(family: str, weights_of: Callable[[Document], list[np.ndarray]], **how: Any) -> None:
    """Given the weights (heads, tokens, tokens) of each layer; of queries that these lack nothing is asked."""
    model = model_of(family)
    backbone = LoadedBackbone(find_backbone(model))
    longest = max(map(len, PROMPTS)) + NEW
    picker = picker_of(All(bucket_size=1), 0)
    buckets = picker.side("k").buckets_until(longest)
    layout = AttentionLayout(ALL_STATISTICS, longest, longest.bit_length(), TOP)
    selection = select(backbone.geometry, CaptureConfig(["q"], attention=list(ALL_STATISTICS)), backbone.pre_missing)
    plan = AttentionPlan(layout, prove(backbone, selection.layers), buckets)
    rows = Accumulator(selection)
    passes = Passes(backbone, selection, rows, Clock(), plan)
    continuing = Continuing(GenerateConfig(max_new_tokens=NEW, **how), (), Answer())
    language = LoadedLanguageModel(model, backbone, continuing.how.caching)
    generation = Generation(language, continuing, passes, picker, selection, backbone.lengths, lambda ids: "")
    documents = [Document(n, f"doc-{n}", np.array(ids, np.int32), False) for n, ids in enumerate(PROMPTS)]
    generation.run(TokenBatch(tuple(documents), 0), {})
    (batch,) = passes.settle()
    for number, document in enumerate(batch.documents):
        for geometry, wanted in zip(backbone.geometry, weights_of(document), strict=True):
            attended = layout.of_layer(geometry)
            width = attended.dims[ATTENTION]
            columns = rows.columns(geometry.layer, ATTENTION, width)
            mine = np.flatnonzero(columns.rows.example_id == number)
            mine = mine[np.argsort(columns.rows.position[mine])]
            assert columns.rows.position[mine].tolist() == list(range(document.n_tokens))
            n = wanted.shape[-1]
            assert n >= document.n_tokens - 1
            values = torch.cat(list(columns.vectors)).view(len(columns), -1, width).numpy()[mine][:n]
            first, found = 0, {}
            for column in layout.columns(geometry.dims["v"]):
                part = values[:, :, first : first + column.values]
                found[column.name] = part[:, :, 0] if column.width is None else part
                first += column.values
            expected = from_weights(wanted)
            assert (found["mass"][..., n:] == 0).all() and (found["distance"][..., n.bit_length() :] == 0).all()
            found["mass"] = found["mass"][..., :n]
            found["distance"] = found["distance"][..., : n.bit_length()]
            assert max(differences(found, expected).values()) < 2e-5
            assert np.allclose(np.exp(found["max_logit"] - found["lse"]), expected["mass"].max(-1), atol=2e-5)
            tops = np.take_along_axis(expected["mass"], found["max_position"][..., None].astype(int), 2)[..., 0]
            assert np.allclose(tops, expected["mass"].max(-1), atol=2e-5)


def test_a_layer_that_attends_twice_in_a_step_is_noticed(monkeypatch: pytest.MonkeyPatch):
    honest = Live.called
    monkeypatch.setattr(Live, "called", lambda self, shown: [honest(self, shown), honest(self, shown)])
    with pytest.raises(CaptureError, match="layer 0 attends twice in one step"):
        test_live_statistics_are_those_of_the_weights_of_the_whole_text("llama")


def test_a_step_whose_keys_are_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """What is computed of a step is compared with what attention returned."""
    honest = steps.text_of

    def shifted(call, row: int, first: int, queries: int):
        found = honest(call, row, first, queries)
        return replace(found, k=found.k.roll(1, 2)) if queries == 1 else found

    monkeypatch.setattr(step_attention, "text_of", shifted)
    with pytest.raises(CaptureError, match="statistics of attention do not follow"):
        test_live_statistics_are_those_of_the_weights_of_the_whole_text("mistral")


@pytest.mark.long
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_around_generate_a_notebook_has_the_same(family: str, cache: str | None, witness: dict[str, np.ndarray]):
    """Of prompts side by side, padded on the left, which the witness was given one by one."""
    longest = max(map(len, PROMPTS))
    pads = [longest - len(prompt) for prompt in PROMPTS]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, PROMPTS, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    model = model_of(family)
    with sniffer.sniff(model, sampler=All(), kinds=KINDS[:3]) as captured:
        model.generate(ids, attention_mask=mask, cache_implementation=cache, **how)
    assert captured.documents == len(PROMPTS)
    layers = sorted(captured.geometry)
    assert f"{family}/0/{len(layers) - 1}/q" in witness and f"{family}/0/{len(layers)}/q" not in witness
    for (layer, kind), heads in captured.selection.heads.items():
        found = [captured.vectors(layer=layer, head=head, kind=kind) for head in heads]
        for document in range(len(PROMPTS)):
            # The last token of a text goes through no step.
            assert captured.tokens(document).tolist() == witness[f"{family}/{document}/ids"].tolist()[:-1]
            mine = found[0].example_ids == document
            place = np.argsort(found[0].positions[mine])
            assert found[0].positions[mine][place].tolist() == list(range(len(place)))
            ours = np.stack([one.vectors[mine][place] for one in found])
            seen = witness[f"{family}/{document}/{layers.index(layer)}/{kind}"]
            assert ours.shape == seen.shape
            assert np.linalg.norm(ours - seen) <= 1e-4 * np.linalg.norm(seen - seen.mean(1, keepdims=True)) + 1e-6


@pytest.mark.long
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", INLINE)
def test_so_it_has_of_attention_in_a_layers_own_code(
    family: str, cache: str | None, inline_witness: dict[str, np.ndarray]
):
    test_around_generate_a_notebook_has_the_same(family, cache, inline_witness)
