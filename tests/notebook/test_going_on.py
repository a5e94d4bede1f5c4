"""Calls that go on with earlier ones: what is kept of each text is what one forward over it all gives attention.

The witness is transformers' own attention function, in a plain forward over the whole text, alone and without padding,
cache or sniff; which texts there are is known from what `generate` returns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder
from transformers import DynamicCache, StaticCache

import sniffer
from sniffer.errors import CaptureError, ConfigError, RunError
from sniffer.notebook.captured import Captured
from sniffer.sampler import All, LogUniform
from tests.notebook.test_listener import COUNTED, IDS, LEFT, RIGHT, generate, received
from tests.tiny_families import tiny_config, tiny_model

finder.install()

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = [IDS[0].tolist(), IDS[1, 5:].tolist()]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").eval()


def text_of(captured: Captured, number: int) -> list[int]:
    """A document's tokens, with what is before it where it parts from another one."""
    own = captured.tokens(number).tolist()
    branch = captured.branches.get(number)
    return own if branch is None else text_of(captured, branch.parent)[: branch.position] + own


def numbers_of(captured: Captured) -> list[int]:
    first = captured.selection.layers[0]
    return list(dict.fromkeys(captured.vectors(layer=first, head=0).example_ids.tolist()))


@torch.no_grad()
def check(captured: Captured, model: Any, texts: Sequence[list[int]] | None = None) -> None:
    """Each document's rows are those of a forward over its text, of all its positions, each once."""
    numbers = sorted(numbers_of(captured), key=lambda number: (number in captured.branches, number))
    if texts is not None:
        assert [text_of(captured, number) for number in numbers] == list(texts)
    for number in numbers:
        text = text_of(captured, number)
        start = captured.branches[number].position if number in captured.branches else 0
        with received() as seen:
            model(input_ids=torch.tensor([text]))
        for place, layer in enumerate(sorted(captured.geometry)):
            for kind, states in zip(("q", "k"), seen[-len(captured.geometry) :][place], strict=True):
                for head in captured.selection.heads.get((layer, kind), ()):
                    found = captured.vectors(layer=layer, head=head, kind=kind)
                    mine = found.example_ids == number
                    order = np.argsort(found.positions[mine], kind="stable")
                    assert found.positions[mine][order].tolist() == list(range(start, len(text)))
                    assert found.token_ids[mine][order].tolist() == text[start:]
                    assert np.allclose(found.vectors[mine][order], states[0, head, start:], atol=2e-5)


def written(out: torch.Tensor, pads: Sequence[int] = (0, 0)) -> list[list[int]]:
    """The texts that went through the model: all but their last tokens."""
    return [row[pad:-1].tolist() for row, pad in zip(out, pads, strict=False)]


HOW = {
    "one step after the other": {},
    "prompt in chunks of 5": {"prefill_chunk_size": 5},
    "static": {"cache_implementation": "static"},
    "static, in chunks": {"cache_implementation": "static", "prefill_chunk_size": 5},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left"])
@pytest.mark.parametrize("how", HOW)
def test_a_generation_is_its_texts(model: Any, how: str, padded: bool):
    mask = {"attention_mask": LEFT} if padded else {}
    expected = generate(model, **mask)
    with sniffer.sniff(model, sampler="all") as captured:
        assert torch.equal(generate(model, **mask, **HOW[how]), expected)
    check(captured, model, written(expected, (0, 5 if padded else 0)))
    assert captured.documents == 2 and not captured.notes


def test_left_padding_has_the_rows_of_no_padding(model: Any):
    """Under a law too, and in chunks of any size: a document's id is all that counts."""
    sampler, kept = LogUniform(base_rate=8.0, min_bucket_size=8), []
    for how in ({}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 7}):
        for batch, mask in ((IDS, LEFT), (IDS[1:, 5:], None)):
            with sniffer.sniff(model, sampler=sampler, kinds=["q", "k", "v", "q_pre", "k_pre"], seed=4) as captured:
                if mask is None:
                    model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0, **how)
                told = {} if mask is None else {"attention_mask": mask}
                model.generate(batch, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1, **told, **how)
            kept.append({kind: captured.vectors(layer=1, head=1, kind=kind) for kind in captured.selection.kinds})
    for other in kept[1:]:
        for kind, found in kept[0].items():
            assert len(found) and other[kind].rows.same(found.rows)
            assert np.allclose(other[kind].vectors, found.vectors, atol=2e-5)


FAMILIES = {"gemma3_text": "static", "lfm2": "prompt in chunks of 5", "deepseek_v3": "static", "gpt2": "no cache"}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str):
    """A window that is left behind, convolutions, latent keys, learned positions."""
    from tests.models.generation_witness import CHANGES

    model = tiny_model(tiny_config(family, **CHANGES.get(family, {})), attn_implementation="sdpa")
    with sniffer.sniff(model, sampler="all") as captured:
        out = model.generate(
            IDS[:1], max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None, **HOW[FAMILIES[family]]
        )
    check(captured, model, written(out))


@pytest.mark.parametrize(
    "how", ["static, in chunks", *(pytest.param(how, marks=pytest.mark.long) for how in list(HOW)[:3])]
)
def test_latent_keys_before_rope_are_those_of_the_whole_text(how: str):
    """They are made of what a cache holds, which is another matter for k_pre than for k."""
    model = tiny_model(tiny_config("deepseek_v3"), attn_implementation="sdpa")
    kinds = ["q_pre", "k_pre"]
    with sniffer.sniff(model, sampler="all", kinds=kinds) as captured:
        out = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, **HOW[how])
    with sniffer.sniff(model, sampler="all", kinds=kinds) as whole, torch.no_grad():
        model(input_ids=out[:, :-1])
    for layer in whole.geometry:
        for kind in kinds:
            ours, theirs = (one.vectors(layer=layer, head=1, kind=kind) for one in (captured, whole))
            assert ours.positions.tolist() == theirs.positions.tolist() == list(range(out.shape[1] - 1))
            assert np.allclose(ours.vectors, theirs.vectors, atol=2e-5)


def test_a_prompt_in_pieces_by_hand(model: Any):
    """The cache comes back from the first call, or is brought along."""
    for cache in (None, DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=30)):
        with sniffer.sniff(model, sampler="all") as captured, torch.no_grad():
            for part in IDS.split([5, 1, 6], 1):
                cache = model(part, past_key_values=cache).past_key_values
        check(captured, model, IDS.tolist())
        assert not captured.notes


def test_beams_are_branches_of_one_prompt(model: Any):
    """Each branch parts where its row went on with another's, and is all that was computed for it."""
    torch.manual_seed(0)
    told = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with sniffer.sniff(model, sampler="all") as captured:
        out = model.generate(IDS, **told, num_return_sequences=3)
    check(captured, model)
    assert captured.documents == 2 and captured.missed.shared_rows == 4 and len(captured.branches) >= 4
    texts = [text_of(captured, number) for number in numbers_of(captured)]
    for row in out[:, :-1].tolist():
        assert any(text[: len(row)] == row or row[: len(text)] == text for text in texts)
    prompt = captured.vectors(layer=1, head=0)
    assert int((prompt.positions < 12).sum()) == 24
    branches = dict(captured.branches)
    captured.clear()
    assert captured.documents == 0 and captured.branches == branches
    with sniffer.sniff(model, example_ids=[1, 2]), pytest.raises(CaptureError, match="which has which id"):
        model.generate(IDS, **told)


def test_several_sequences_of_a_prompt(model: Any):
    torch.manual_seed(0)
    with sniffer.sniff(model, sampler="all") as captured:
        out = model.generate(
            IDS[:1], max_new_tokens=5, do_sample=True, num_return_sequences=3, pad_token_id=0, eos_token_id=None
        )
    check(captured, model)
    texts = [text_of(captured, number) for number in numbers_of(captured)]
    assert captured.documents == 1 and sorted(texts) == sorted(written(out, (0, 0, 0)))


def test_a_quantized_cache(model: Any):
    """Rows are what attention is given at each step, rounded where the cache rounds. Beams are refused."""
    told = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}, "eos_token_id": None}
    plain = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with received() as seen:
        out = model.generate(IDS[:1], **plain, **told)
    with sniffer.sniff(model, sampler="all") as captured:
        model.generate(IDS[:1], **plain, **told)
    for layer in (0, 1):
        for kind, place in (("q", 0), ("k", 1)):
            steps = [step[place][0, :, -step[0].shape[2] :] for step in seen[layer::2]]
            found = captured.vectors(layer=layer, head=1, kind=kind)
            assert found.positions.tolist() == list(range(16)) and captured.tokens(0).tolist() == out[0, :-1].tolist()
            assert np.array_equal(found.vectors, torch.cat(steps, 1)[1])
    with sniffer.sniff(model), pytest.raises(CaptureError, match="rows of a quantized QuantizedCache were changed"):
        model.generate(IDS[:1], num_beams=3, **plain, **told)


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_guesses_that_are_rejected_are_no_rows(model: Any, how: str):
    prompt = torch.cat([IDS[:1, :6], IDS[:1, :6], IDS[:1, :3]], 1)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight += torch.randn_like(assistant.lm_head.weight)
    told = {"prompt_lookup_num_tokens": 4} if how == "lookup" else {"assistant_model": assistant}
    with sniffer.sniff(model, sampler="all") as captured:
        out = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **told)
    check(captured, model)
    (number,) = numbers_of(captured)
    text = out[0].tolist()
    assert captured.missed.taken_back_tokens and text_of(captured, number) == text[: captured.tokens(number).size]
    assert captured.tokens(number).size >= len(text) - 2


def test_a_prompt_that_several_texts_share(model: Any):
    """By a copy of its cache, or by going back to it."""
    with torch.no_grad():
        cache = model(IDS[:1], use_cache=True).past_key_values
        with sniffer.sniff(model, sampler="all") as captured:
            cache = model(IDS[:1], use_cache=True).past_key_values
            for question in (IDS[1:, :4], IDS[1:, 4:8]):
                model(question, past_key_values=copy.deepcopy(cache))
            model(IDS[1:, 8:11], past_key_values=cache)
            cache.crop(-3)
            model(IDS[1:, 9:], past_key_values=cache)
    check(captured, model)
    texts = {tuple(text_of(captured, number)) for number in numbers_of(captured)}
    ends = (IDS[1, :4], IDS[1, 4:8], IDS[1, 8:11], IDS[1, 9:])
    assert texts == {tuple(IDS[0].tolist() + end.tolist()) for end in ends} and captured.documents == 1


@torch.no_grad()
def test_a_call_that_grows_by_a_token_is_a_document_only_if_that_is_known(model: Any):
    with sniffer.sniff(model, sampler=All()) as captured:
        for length in (10, 11, 12):
            model(IDS[:, :length])
        model(IDS[:, :12])
    check(captured, model, [IDS[0].tolist(), IDS[1].tolist()] * 2)
    assert captured.missed.repeats == 2 and "took 2 calls that repeated the one before" in repr(captured)
    with sniffer.sniff(model, example_ids=range(9)) as captured:
        model(IDS[:, :10])
        with pytest.raises(CaptureError, match="is the one before it and a token more"):
            model(IDS[:, :11])


@torch.no_grad()
def test_what_cannot_go_on_is_refused_and_uses_no_ids(model: Any):
    with sniffer.sniff(model, sampler="all") as captured:
        cache = model(IDS, RIGHT).past_key_values
        with pytest.raises(CaptureError, match="behind padding"):
            model(IDS[:, :2], torch.cat([RIGHT, RIGHT[:, :2]], 1), past_key_values=copy.deepcopy(cache))
        cache = model(IDS, LEFT, position_ids=COUNTED).past_key_values
        for layer in cache.layers:
            layer.keys = layer.keys + 1
        with pytest.raises(CaptureError, match="is no row that the call before left in it") as refusal:
            model(IDS[:, :1], torch.cat([LEFT, LEFT[:, -1:]], 1), past_key_values=cache)
    assert "\n" not in str(refusal.value) and captured.documents == 4 and captured.rows["q"] == (19 + 19) * 8


@torch.no_grad()
def test_a_call_that_fails_in_the_middle_of_a_text_is_none(model: Any):
    """The next one goes on as if it had not been; a branch keeps its id."""
    with sniffer.sniff(model, sampler="all") as captured:
        cache = model(IDS[:1], use_cache=True).past_key_values
        spare = copy.deepcopy(cache)
        handle = model.lm_head.register_forward_pre_hook(lambda *_: {}["none"])
        with pytest.raises(KeyError):
            model(IDS[1:, :3], past_key_values=cache)
        handle.remove()
        assert captured.partial is not None and captured.partial.tokens(0).tolist() == IDS[1, :3].tolist()
        assert captured.partial.vectors(layer=1, head=0).positions.tolist() == [12, 13, 14]
        model(IDS[1:, :4], past_key_values=spare)
    check(captured, model, [IDS[0].tolist() + IDS[1, :4].tolist()])


@torch.no_grad()
def test_what_is_captured_reads_as_a_run_does(model: Any):
    """Each row of `scan` is one of `vectors`, and pairs are what both have; nothing is left after `clear`."""
    sampler = LogUniform(base_rate=6.0, min_bucket_size=8)
    with sniffer.sniff(model, sampler=sampler, example_ids=["one", "two"]) as captured:
        model(IDS)
        table = captured.scan(layers=[1]).collect()
        for kind in ("q", "k"):
            for head in captured.selection.heads[1, kind]:
                found = captured.vectors(layer=1, head=head, kind=kind)
                mine = table.filter((table["kind"] == kind) & (table["head"] == head))
                assert np.array_equal(mine["vector"].to_numpy(), found.vectors) and len(found)
                assert mine["position"].to_list() == found.positions.tolist()
        queries, keys = (captured.vectors(layer=1, head=head, kind=kind) for head, kind in ((3, "q"), (1, "k")))
        at = {pair: n for n, pair in enumerate(zip(keys.example_ids, keys.positions, strict=True))}
        pairs = captured.pairs(layer=1, q_head=3)
        both = [n for n, pair in enumerate(zip(queries.example_ids, queries.positions, strict=True)) if pair in at]
        assert pairs.k_head == 1 and np.array_equal(pairs.q, queries.vectors[both]) and 0 < len(both) < len(queries)
        for n, pair in enumerate(zip(pairs.example_ids, pairs.positions, strict=True)):
            assert np.array_equal(pairs.k[n], keys.vectors[at[pair]])
            assert pairs.inclusion_probability[n] == pytest.approx((6 / 8) ** 2)
        with pytest.raises(RunError, match="make no sense"):
            captured.pairs(layer=1, q_head=3, key_kind="q")
        captured.clear()
        assert captured.documents == 0 and captured.rows == {"q": 0, "k": 0}
    complaint = "sampler='most' is none of log_uniform, uniform, all, per_side"
    with pytest.raises(ConfigError, match=complaint), sniffer.sniff(model, sampler="most"):
        pass


@torch.no_grad()
def test_a_copy_of_one_of_two_equal_caches_is_nobodys(model: Any):
    with sniffer.sniff(model, sampler="all") as captured:
        caches = [model(IDS[:1], use_cache=True).past_key_values for _ in range(2)]
        model(IDS[1:, :3], past_key_values=copy.deepcopy(caches[1]))
        assert captured.passed_over == 1
        model(IDS[1:, :3], past_key_values=caches[1])
    check(captured, model, [IDS[0].tolist(), IDS[0].tolist() + IDS[1, :3].tolist()])


def test_a_model_on_several_devices_writes_what_it_would(model: Any):
    """What is drawn too: what is proven in the middle of a generation leaves random numbers and states alone."""
    accelerate = pytest.importorskip("accelerate")
    places = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(places, "cpu")
    one = accelerate.dispatch_model(copy.deepcopy(model), device_map, main_device="cpu", force_hooks=True)
    told = {"attention_mask": LEFT, "max_new_tokens": 6, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(3)
    expected = one.generate(IDS, **told)
    torch.manual_seed(3)
    with sniffer.sniff(one, sampler="all") as captured:
        assert torch.equal(one.generate(IDS, **told), expected)
    check(captured, model, written(expected, (0, 5)))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_models_for_images_and_text(family: str):
    """Their language model is handed vectors, and positions that the model keeps between its calls."""
    model = tiny_model(tiny_config(family))
    expected = generate(model, attention_mask=LEFT)
    with sniffer.sniff(model, sampler="all") as captured:
        assert torch.equal(generate(model, attention_mask=LEFT), expected)
    check(captured, model, written(expected, (0, 5)))
