"""Statistics of attention are those of the weights that a layer attends with, and what cannot be shown is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone

from sniffer.errors import CaptureError, UnsupportedModelError
from sniffer.forward.attention import calls, masks, scores
from sniffer.forward.attention.calls import Call
from sniffer.forward.attention.prove import prove
from sniffer.forward.attention.scores import Slice
from sniffer.forward.attention.softmax import Softmax, Watch
from sniffer.forward.attention.statistics import BucketRuns, statistics
from sniffer.sampler import LogUniform
from sniffer.types import STATISTICS, AttentionLayout, Sections
from tests.helpers_attention import TOP, batch_of, captured, differences, from_weights
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

finder.install()

CPU = torch.device("cpu")


def backbone_of(family: str, attention: str = "sdpa", **changes: Any) -> LoadedBackbone:
    return LoadedBackbone(find_backbone(tiny_model(tiny_config(family, **changes), attn_implementation=attention)))


def test_all_statistics_of_a_slice_by_definition():
    """Two heads, three queries, seven keys and a sink, masked behind each query; buckets that come twice."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, 4, 6])
    logits = 3 * torch.randn(2, 3, 8, generator=generator)
    for place, position in enumerate(positions.tolist()):
        logits[:, place, position + 1 : 7] = -math.inf
    values = torch.randn(1, 7, 5, generator=generator)
    buckets = np.array([0, 0, 1, 1, 0, 2, 2, 2], dtype=np.int32)
    layout = AttentionLayout(tuple(STATISTICS), 3, 3, TOP, ("end", "none of it"))
    named = BucketRuns.of_sections(Sections.spread([(1, 3, "end"), (5, 6, "end")], 7), layout.sections, CPU)
    one = Slice(slice(0, 3), slice(0, 2), logits, values, keys=7)
    rows = statistics(one, positions, layout, BucketRuns.of(buckets, CPU), named).numpy()

    exact, first = logits.double().numpy(), 0
    for column in layout.columns(5):
        found = rows[:, :, first : first + column.values]
        first += column.values
        for head in range(2):
            for place, position in enumerate(positions.tolist()):
                powers = np.exp(exact[head, place])
                weights = powers[:7] / powers.sum()
                sink = powers[7] / powers.sum()
                order = [key for key in np.argsort(-weights) if weights[key] > 0][:TOP]
                missing = [0] * (TOP - len(order))
                out = sum(weights[key] * values[0, key].double().numpy() for key in range(7))
                wanted = {
                    "lse": [np.log(powers.sum())],
                    "entropy": [-sum(part * np.log(part) for part in [*weights, sink] if part > 0)],
                    "max_logit": [exact[head, place, :7].max()],
                    "max_position": [exact[head, place, :7].argmax()],
                    "first": [weights[0]],
                    "self": [weights[position]],
                    "sink": [sink],
                    "mass": [weights[[0, 1, 4]].sum(), weights[[2, 3]].sum(), weights[[5, 6]].sum()],
                    "distance": [
                        sum(weights[k] for k in range(position + 1) if int(math.log2(1 + position - k)) == number)
                        for number in range(3)
                    ],
                    "section_mass": [weights[[1, 2, 5]].sum(), 0],
                    "top": [*weights[order], *missing],
                    "top_position": [*order, *(-1 for _ in missing)],
                    "out_norm": [np.sqrt((out**2).sum())],
                    "out": out,
                }[column.name]
                assert np.allclose(found[head, place], wanted, atol=1e-6), column.name
    assert first == rows.shape[2] == layout.width(5)


FAMILIES = ["llama", "gemma2", "gpt_oss", "bloom", "falcon", "mpt", "deepseek_v3", "llama4_text", "jamba", "gpt_neo"]


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_the_weights_that_the_model_returns(family: str):
    attention = "eager" if family in ("gemma2", "gpt_oss", "bloom", "mpt", "gpt_neo") else "sdpa"
    ids = tiny_ids()
    found = captured(backbone_of(family, attention), batch_of(ids))
    module = backbone_of(family, "eager").module
    with torch.inference_mode():
        weights = module(input_ids=ids, output_attentions=True).attentions
    for number, one in enumerate(weight for weight in weights if weight is not None):
        for row in range(len(ids)):
            here = {name: values[row * 24 : row * 24 + 24] for name, values in list(found.values())[number].items()}
            wanted = from_weights(one[row].numpy())
            assert max(differences(here, wanted).values()) < 1e-5
            assert np.allclose(np.exp(here["max_logit"] - here["lse"]), wanted["mass"].max(-1), atol=1e-5)


def logits_by_hand(family: str, layer: int, q: np.ndarray, k: np.ndarray, backbone: LoadedBackbone) -> np.ndarray:
    """(heads, tokens, tokens [+ 1]) from the family's formula, in double precision; -inf where a mask is."""
    config, attention = backbone.module.config, list(backbone.layer_of)[layer]
    window = backbone.geometry[layer].sliding_window
    heads, tokens = q.shape[0], q.shape[1]
    k = np.repeat(k, heads // len(k), axis=0)
    back = np.arange(tokens)[:, None] - np.arange(tokens)
    found = q @ k.transpose(0, 2, 1)
    if family == "gemma2":
        found = found * config.query_pre_attn_scalar**-0.5
        found = config.attn_logit_softcapping * np.tanh(found / config.attn_logit_softcapping)
    else:
        found = found * q.shape[2] ** -0.5
    if family == "bloom":  # ALiBi (Press et al., 2022), for a power of two of heads
        slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
        found = found + slopes[:, None, None] * np.arange(tokens)
    seen = (back >= 0) & (back < (window or tokens))
    found = np.where(seen, found, -np.inf)
    if family == "gpt_oss":
        sinks = attention.sinks.detach().double().numpy()[:, None, None]
        found = np.concatenate([found, np.broadcast_to(sinks, (heads, tokens, 1))], axis=2)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "bloom", "mistral"])
def test_log_sum_exp_and_the_largest_logit_by_formula(family: str):
    """Weights do not tell a constant that all logits have in common; formulas written by hand do."""
    changes = {"sliding_window": 6} if family in ("gemma2", "gpt_oss", "mistral") else {}
    backbone = backbone_of(family, "eager" if family in ("gemma2", "gpt_oss", "bloom") else "sdpa", **changes)
    batch = batch_of(tiny_ids(batch=1))
    found = captured(backbone, batch, statistics=("lse", "max_logit", "sink"))
    from sniffer.tap import tap

    seen: list[Any] = []
    with torch.inference_mode(), tap(seen.append):
        backbone(torch.from_numpy(batch.input_ids()))
    for layer, (event, here) in enumerate(zip(seen, found.values(), strict=True)):
        q, k = (one[0].double().numpy() for one in (event.q, event.k))
        logits = logits_by_hand(family, layer, q, k, backbone)
        powers = np.exp(logits)
        assert np.allclose(here["lse"], np.log(powers.sum(-1)).T, atol=1e-5)
        assert np.allclose(here["max_logit"], logits[:, :, :24].max(-1).T, atol=1e-5)
        assert np.allclose(here["sink"], (powers[:, :, 24:].sum(-1) / powers.sum(-1)).T, atol=1e-6)


def test_a_largest_value_that_was_taken_away_is_given_back():
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    seen = Softmax(3)
    with Watch(seen.look):
        less = logits - logits.max(dim=-1, keepdim=True).values
        torch.nn.functional.softmax(less, dim=-1)
    assert seen.logits is logits
    other = Softmax(3)
    with Watch(other.look):
        torch.softmax(logits - 5.0, dim=-1)
    assert other.logits is not logits and float(other.logits.max()) == 0.0


def test_statistics_of_a_text_do_not_depend_on_the_batch_nor_on_slices(monkeypatch: pytest.MonkeyPatch):
    backbone = backbone_of("gemma3_text", sliding_window=8)
    ids = tiny_ids(batch=3)
    lengths = [24, 9, 17]
    together = captured(backbone, batch_of(ids, lengths), LogUniform(base_rate=8.0))
    monkeypatch.setattr(scores, "SLICE_BYTES", 200)
    cut = captured(backbone, batch_of(ids, lengths), LogUniform(base_rate=8.0))
    alone = [captured(backbone, replace_ids(ids, n, size), LogUniform(base_rate=8.0)) for n, size in enumerate(lengths)]
    for layer, columns in together.items():
        for name, values in columns.items():
            assert np.allclose(values, cut[layer][name], atol=1e-5), name
            width = np.concatenate([padded(one[layer][name], values) for one in alone])
            assert np.allclose(values, width, atol=1e-5), name


def replace_ids(ids: torch.Tensor, row: int, size: int) -> Any:
    batch = batch_of(ids[row : row + 1, :size])
    return replace(batch, documents=(replace(batch.documents[0], example_id=row),))


def padded(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """With as many buckets and distances as a longer text has."""
    missing = like.shape[-1] - values.shape[-1] if values.ndim == 3 else 0
    return np.pad(values, ((0, 0), (0, 0), (0, missing))) if missing else values


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_model_computes_what_it_computes_without(family: str):
    backbone, ids = backbone_of(family, "eager"), tiny_ids()
    with torch.inference_mode():
        plain = backbone(ids)
    outputs: list[Any] = []
    captured(backbone, batch_of(ids), outputs=outputs)
    assert torch.equal(plain, outputs[0])


def forgets_windows(call: Call, *where: Any) -> torch.Tensor:
    return ORIGINAL_ROWS(replace(call, mask=None), *where)


ORIGINAL_ROWS = masks.mask_rows
MUTANTS: dict[str, tuple[str, str, dict[str, Any], Callable[[pytest.MonkeyPatch], None]]] = {
    "a window": (
        "mistral",
        "sdpa",
        {"sliding_window": 6},
        lambda patch: patch.setattr(scores, "mask_rows", forgets_windows),
    ),
    "a soft cap": ("gemma2", "eager", {"attn_logit_softcapping": 0.5}, lambda patch: without(patch, "softcap")),
    "a scale": ("llama", "sdpa", {}, lambda patch: without(patch, "scaling", 1.0)),
    "sinks": ("gpt_oss", "eager", {}, lambda patch: patch.setattr(Softmax, "look", forgets_sinks)),
}


def without(patch: pytest.MonkeyPatch, name: str, value: Any = None) -> None:
    """Calls of attention as if a keyword had been overlooked."""
    original = Call.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Call], shown: Any) -> Call:
        call = original(cls, shown)
        return replace(call, options={**call.options, name: value})

    patch.setattr(Call, "of", classmethod(of))


ORIGINAL_LOOK = Softmax.look


def forgets_sinks(self: Softmax, name: str, args: Any, kwargs: Any, result: Any) -> None:
    ORIGINAL_LOOK(self, name, args, kwargs, result)
    if self.logits is not None and self.product is None:
        self.logits = self.logits[..., : self.keys]


@pytest.mark.parametrize("forgotten", MUTANTS)
def test_the_probe_finds_what_was_forgotten(forgotten: str, monkeypatch: pytest.MonkeyPatch):
    family, attention, changes, mutate = MUTANTS[forgotten]
    backbone = backbone_of(family, attention, **changes)
    prove(backbone, list(backbone.layer_of.values()))
    mutate(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"not possible in layer \d+: softmax of its logits times"):
        prove(backbone, list(backbone.layer_of.values()))


def test_a_window_beyond_the_probe_is_looked_at_in_the_run(monkeypatch: pytest.MonkeyPatch):
    backbone = backbone_of("mistral", sliding_window=16)
    captured(backbone, batch_of(tiny_ids()))
    monkeypatch.setattr(scores, "mask_rows", forgets_windows)
    prove(backbone, list(backbone.layer_of.values()))
    with pytest.raises(CaptureError, match="layer 0: statistics of attention do not follow .* a text of 24 tokens"):
        captured(backbone, batch_of(tiny_ids()))


def test_what_cannot_be_shown_is_refused_by_name():
    """A sink that scales the output is none of a softmax: its logits do not give what attention returned."""
    backbone = backbone_of("granite_swa", "eager")
    with pytest.raises(UnsupportedModelError, match="capture.attention is not possible in layer 0"):
        prove(backbone, [0])


def test_query_heads_of_one_key_head_lie_side_by_side_where_that_is_the_same():
    grouped = backbone_of("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    assert all(way.ungrouped for way in prove(grouped, [0, 1]).values())
    sinks = backbone_of("gpt_oss", "eager")
    assert not any(way.ungrouped or way.inline for way in prove(sinks, [0, 1]).values())
    assert all(way.inline for way in prove(backbone_of("bloom", "eager"), [0, 1]).values())


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_implementations_give_the_same(attention: str):
    """Of flex attention, whose mask is a rule, and of attention step by step, whose mask is numbers.

    Flex attention computes here what it would compile, which takes half a minute.
    """
    changes = {"sliding_window": 6}
    ids = tiny_ids(batch=1)
    wanted = captured(backbone_of("mistral", **changes), batch_of(ids))
    with torch.compiler.set_stance("force_eager"):
        found = captured(backbone_of("mistral", attention, **changes), batch_of(ids))
    for layer, columns in wanted.items():
        for name in ("lse", "entropy", "mass", "out_norm"):
            assert np.allclose(columns[name], found[layer][name], atol=1e-4), name


def test_no_tensor_of_all_queries_by_all_keys_is_made(monkeypatch: pytest.MonkeyPatch):
    """Logits are of the picked queries alone, whatever the text's length."""
    shapes: list[tuple[int, ...]] = []
    original = calls.by_steps

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = original(*args, **kwargs)
        shapes.append(tuple(logits.shape))
        return logits

    backbone = backbone_of("llama", max_position_embeddings=4096)
    monkeypatch.setattr(scores, "by_steps", watched)
    found = captured(backbone, batch_of(tiny_ids(batch=1, seq=2048)), LogUniform(base_rate=1.0), layers=[0])
    picks = len(found[0]["lse"])
    run = [shape for shape in shapes if shape[2] > 24]
    assert 0 < picks < 60 and max(shape[1] for shape in run) <= picks
