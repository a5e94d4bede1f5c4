"""Moments of somebody's calls are sums over every position of every text, in double precision.

The witness is NumPy on what transformers hands to attention in a plain forward over each text, alone and without sniff.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder

import sniffer
from sniffer import open_run
from sniffer.errors import ConfigError, RunError
from sniffer.notebook import summed
from sniffer.notebook.captured import Captured
from sniffer.runs.verify import verify
from sniffer.sampler import All, Uniform
from sniffer.types import Moments
from tests.notebook.test_going_on import HOW
from tests.notebook.test_listener import COUNTED, IDS, LEFT, PACKED, RIGHT, generate, received

finder.install()

pytestmark = pytest.mark.filterwarnings("ignore")

NO_ROWS = Uniform(base_rate=0.0, bucket_size=4)
TEXTS = [IDS[0], IDS[1], IDS[1, :7], IDS[1, 5:], IDS[0, :5], IDS[0, 5:]]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").eval()


@torch.no_grad()
def vectors(model: Any, texts: list[torch.Tensor], layer: int, head: int, kind: str) -> list[np.ndarray]:
    """Of each text, (tokens, dim) in float64."""
    found = []
    for text in texts:
        with received() as seen:
            model(input_ids=text[None])
        found.append(seen[layer]["qk".index(kind)][0, head].double().numpy())
    return found


def check(captured: Any, model: Any, texts: list[torch.Tensor], apart: float = 1e-5, kinds: str = "qk") -> None:
    for layer, head, kind in ((0, 0, "k"), (1, 3, "q"), (1, 1, "k")):
        if kind not in kinds:
            continue
        alone = vectors(model, texts, layer, head, kind)
        together = np.concatenate(alone)
        found = captured.moments(layer=layer, head=head, kind=kind)
        assert found.n == len(together)
        assert np.allclose(found.mean, together.mean(0), atol=apart)
        assert np.allclose(found.covariance, np.cov(together.T, bias=True), atol=apart)
        assert np.allclose(found.minimum, together.min(0), atol=apart)
        assert np.allclose(found.maximum, together.max(0), atol=apart)
        assert np.isclose(found.norm, np.linalg.norm(together, axis=1).mean(), atol=apart)
        of_first = np.concatenate([one[:4] for one in alone])
        first = captured.moments(layer=layer, head=head, kind=kind, bucket=0)
        assert first.n == len(of_first) and np.allclose(first.mean, of_first.mean(0), atol=apart)


def same(one: Moments, other: Moments, apart: float = 0.0) -> bool:
    names = ("n", "mean", "minimum", "maximum", "norm", "pairs", "squares", "products")
    return all(np.allclose(getattr(one, name), getattr(other, name), rtol=apart, atol=apart) for name in names)


@torch.no_grad()
def call_all(model: Any) -> None:
    model(IDS)
    model(IDS[1:], RIGHT[1:])
    model(IDS[1:], LEFT[1:], position_ids=COUNTED[1:])
    model(IDS[:1], position_ids=PACKED[:1], use_cache=False)


@torch.no_grad()
def test_calls_of_any_kind_add_up(model: Any):
    """And as separate captures of each call merge, to the last digits."""
    with sniffer.sniff(model, sampler=NO_ROWS, moments=["q", "k"]) as captured:
        call_all(model)
    check(captured, model, TEXTS)
    assert captured.rows == {"q": 0, "k": 0}
    pieces = []
    for text in TEXTS:
        with sniffer.sniff(model, sampler=NO_ROWS, moments=["q", "k"]) as one:
            model(text[None])
        pieces.append(one)
    for layer, head, kind in ((0, 1, "k"), (1, 2, "q")):
        apart = Moments.merged([one.moments(layer=layer, head=head, kind=kind) for one in pieces])
        assert same(apart, captured.moments(layer=layer, head=head, kind=kind), 1e-5)
    whole, halves = Captured.moments, []
    for some in (slice(0, 1), slice(1, 2)):
        with sniffer.sniff(model, sampler=NO_ROWS, moments=["q"]) as one:
            model(IDS[some])
        halves.append(whole(one, layer=1, head=2, kind="q"))
    with sniffer.sniff(model, sampler=NO_ROWS, moments="q") as one:
        model(IDS[:1])
        model(IDS[1:])
    assert same(Moments.merged(halves), one.moments(layer=1, head=2, kind="q"), 1e-12)


def test_while_a_model_writes_and_as_a_run(model: Any, tmp_path: Path):
    """The same whatever way a text comes; with gradients, and under autocast, what is summed stays exact."""
    expected = generate(model, attention_mask=LEFT)
    texts = [expected[0, :-1], expected[1, 5:-1]]
    for how in ("one step after the other", "static, in chunks", "no cache"):
        with sniffer.sniff(model, sampler=NO_ROWS, kinds="q", moments=["q", "k", "v", "k_pre"]) as captured:
            assert torch.equal(generate(model, attention_mask=LEFT, **HOW[how]), expected)
        check(captured, model, texts)
    run = open_run(captured.save(tmp_path / "run"))
    assert verify(tmp_path / "run")[1] == []
    for kind in ("q", "k", "v", "k_pre"):
        mine, theirs = (one.moments(layer=1, head=1, kind=kind, bucket=1) for one in (captured, run))
        assert (mine.pairs is None) == (kind == "v")
        assert all(np.array_equal(getattr(mine, name), getattr(theirs, name)) for name in ("n", "mean", "products"))
    with sniffer.sniff(model, sampler="all", moments=["q"], moments_second="diagonal") as captured:
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS).logits.sum().backward()
        rows, found = captured.vectors(layer=1, head=2).vectors, captured.moments(layer=1, head=2, kind="q")
        assert found.covariance is None and found.std is not None
        assert np.allclose(found.std, rows.astype(np.float64).std(0), rtol=1e-5)
        captured.clear()
        with torch.inference_mode():
            model(IDS[:1])
        model(IDS[1:])
        assert captured.moments(layer=1, head=2, kind="q").n == 24


def test_guesses_that_are_rejected_are_left_out_and_what_cannot_be_told_is_refused(model: Any, tmp_path: Path):
    prompt = torch.cat([IDS[:1, :6], IDS[:1, :6], IDS[:1, :3]], 1)
    told: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with sniffer.sniff(model, sampler=Uniform(bucket_size=4), moments="k") as captured:
        with pytest.raises(RunError, match="no document has been counted"):
            captured.moments(layer=0, head=0, kind="k")
        out = model.generate(prompt, prompt_lookup_num_tokens=4, **told)
        assert captured.notes and captured.missed.taken_back_tokens
        text = out[0, : len(captured.tokens(0))]
    check(captured, model, [text], kinds="k")
    with sniffer.sniff(model, sampler=Uniform(bucket_size=4), moments="k") as captured:
        cache = model(IDS[:1], use_cache=True).past_key_values
        assert captured.moments(layer=0, head=0, kind="k").n == 12
        cache.crop(-3)
        for ask in (lambda: captured.moments(layer=0, head=0, kind="k"), lambda: captured.save(tmp_path / "run")):
            with pytest.raises(RunError, match="moments are of 3 tokens that a cache has lost after they were summed"):
                ask()
        captured.clear()
        handle = model.lm_head.register_forward_pre_hook(lambda *_: {}["none"])
        with pytest.raises(KeyError):
            model(IDS)
        handle.remove()
        assert captured.partial is not None and captured.partial.moments(layer=0, head=0, kind="k").n == 24
        model(IDS[:1])
        assert captured.moments(layer=0, head=0, kind="k").n == 12
        with pytest.raises(RunError, match="kind q, head 0 was not counted"):
            captured.moments(layer=0, head=0, kind="q")
    with pytest.raises(ConfigError, match="names .'w'."), sniffer.sniff(model, moments="w"):
        pass
    with sniffer.sniff(model) as captured, pytest.raises(RunError, match="no moments were asked for"):
        captured.moments(layer=0, head=0, kind="q")


def test_held_steps_are_summed_whole(model: Any, monkeypatch: pytest.MonkeyPatch):
    """Of beams that change rows, of guesses, of chunks beside long calls: moments are those of all rows, by bucket."""
    monkeypatch.setattr(summed, "HELD", 5)
    monkeypatch.setattr(summed, "FEW", 6)
    torch.manual_seed(0)
    told: dict[str, Any] = {"max_new_tokens": 17, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with sniffer.sniff(model, sampler=All(bucket_size=4), moments=["q", "k"]) as captured:
        model.generate(IDS, num_beams=3, attention_mask=LEFT, **told)
        model.generate(IDS[:1].repeat(1, 2), prompt_lookup_num_tokens=4, **told)
        model.generate(IDS, prefill_chunk_size=5, **told)
        model.generate(IDS, num_return_sequences=2, **{**told, "do_sample": True})
    assert captured.branches and captured.notes
    for head, kind in ((3, "q"), (0, "k")):
        rows = captured.vectors(layer=1, head=head, kind=kind)
        for bucket in (None, 0, 3, 6):
            some = rows.vectors[rows.buckets == bucket if bucket is not None else slice(None)].astype(np.float64)
            found = captured.moments(layer=1, head=head, kind=kind, bucket=bucket)
            assert found.n == len(some) and np.allclose(found.mean, some.mean(0), atol=1e-6)
            assert found.covariance is not None
            assert np.allclose(found.covariance, np.cov(some.T, bias=True), atol=1e-6)
            assert np.array_equal(found.minimum, some.min(0)) and np.array_equal(found.maximum, some.max(0))
