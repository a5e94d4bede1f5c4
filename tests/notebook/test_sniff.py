"""Sniffing a loaded model: the same vectors as a run, and a model that is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sniffer
from sniffer.errors import CaptureError, ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.sampler import All, LogUniform
from tests.tiny_families import tiny_config, tiny_model
from tests.tiny_run import TEXTS

KINDS = ["q", "k", "v", "q_pre", "k_pre"]


@pytest.fixture
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").eval()


def encoded(checkpoint: Path, *texts: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)(list(texts), return_tensors="pt", padding=True)


def same(captured: Any, run: Run) -> None:
    for layer in run.layers:
        for kind in run.kinds:
            for head in run.heads(layer, kind):
                mine, theirs = (source.vectors(layer=layer, head=head, kind=kind) for source in (captured, run))
                for column in ("positions", "buckets", "token_ids", "example_ids", "inclusion_probability"):
                    assert np.array_equal(getattr(mine, column), getattr(theirs, column)), column
                assert len(mine) and np.array_equal(mine.vectors, theirs.vectors)


@pytest.mark.parametrize("sampler", [All(), LogUniform(base_rate=40.0, min_bucket_size=16)])
def test_the_vectors_are_those_of_a_run(run: Any, checkpoint: Path, model: Any, sampler: Any):
    name, keys = ("all", []) if isinstance(sampler, All) else ("log_uniform", [])
    if name == "log_uniform":
        keys = ["sampler.base_rate=40", "sampler.min_bucket_size=16"]
    captured_run = run(f"sampler={name}", *keys, f"capture.kinds=[{','.join(KINDS)}]", "batch.max_tokens=1", "seed=3")
    ids = dict(captured_run.examples().select("source_id", "example_id").iter_rows())
    with sniffer.sniff(model, sampler=sampler, kinds=KINDS, seed=3, example_ids=map(ids.get, TEXTS)) as captured:
        for text in TEXTS.values():
            model(**encoded(checkpoint, text))
    same(captured, captured_run)
    assert captured.rows == captured_run.manifest.rows_by_kind


@pytest.mark.parametrize(("family", "first"), [("bloom", 0), ("opt", 0), ("gpt2", 3)])
def test_padding_on_the_left_counts_where_the_model_counts_it(family: str, first: int):
    """No position_ids are given: ALiBi, positions by the mask, and by the column."""
    model = tiny_model(tiny_config(family), attn_implementation="eager")
    ids = torch.tensor([[0, 0, 0, 33, 44, 55], [30, 41, 52, 63, 74, 85]])
    with sniffer.sniff(model, sampler=All()) as captured:
        model(ids, attention_mask=(ids != 0).long())
        model(ids[:1, 3:])
    found = captured.vectors(layer=1, head=0, kind="k")
    padded, alone = (found.example_ids == number for number in (0, 2))
    assert found.positions[padded].tolist() == [first, first + 1, first + 2]
    assert found.positions[alone].tolist() == [0, 1, 2]
    assert np.allclose(found.vectors[padded], found.vectors[alone], atol=1e-5) == (first == 0)


def test_padding_is_no_document(checkpoint: Path, model: Any):
    batch = encoded(checkpoint, *TEXTS.values())
    with sniffer.sniff(model, sampler=All()) as captured:
        model(**batch)
    found = captured.vectors(layer=1, head=0, kind="k")
    lengths = batch["attention_mask"].sum(1).tolist()
    assert [int((found.example_ids == row).sum()) for row in range(3)] == lengths


def test_the_model_computes_what_it_did_and_is_left_as_it_was(checkpoint: Path, model: Any):
    batch = encoded(checkpoint, TEXTS["third"])
    plain = model(**batch).logits
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]
    with sniffer.sniff(model, layers=[0]):
        assert torch.equal(model(**batch).logits, plain)
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()] == hooks
    assert torch.equal(model(**batch).logits, plain)


def test_gradients_still_flow(checkpoint: Path, model: Any):
    with sniffer.sniff(model, sampler=All()) as captured:
        model(**encoded(checkpoint, TEXTS["third"])).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    assert len(captured.vectors(layer=0, head=0))


def test_a_forward_that_fails_leaves_the_tap_closed(checkpoint: Path, model: Any):
    batch = encoded(checkpoint, TEXTS["third"])
    with sniffer.sniff(model, sampler=All()) as captured:
        handle = model.model.layers[1].register_forward_pre_hook(lambda *arguments: {}["no layer"])
        with pytest.raises(KeyError, match="no layer"):
            model(**batch)
        handle.remove()
        assert captured.rows == {"q": 0, "k": 0}
        model(**batch)
    assert captured.rows["q"] > 0


@pytest.mark.parametrize(("token", "column"), [(10_000, 3), (-1, 0), (1 << 40, 2)])
def test_a_token_without_a_row_in_the_embedding_never_reaches_the_model(
    checkpoint: Path, model: Any, token: int, column: int
):
    """On a GPU the forward would end the process; padding is looked up like any other."""
    batch = encoded(checkpoint, TEXTS["third"])
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    ids[0, column], reached = token, []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda *arguments: reached.append(arguments))
    with sniffer.sniff(model, sampler=All()) as captured:
        reached.clear()
        with pytest.raises(CaptureError, match=f"the token {token} in row 0, column {column}, .* rows 0 to 256"):
            model(input_ids=ids, attention_mask=mask)
        assert not reached and captured.rows == {"q": 0, "k": 0}
        model(**batch)
    handle.remove()
    assert captured.rows["q"] > 0


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda batch: {"inputs_embeds": torch.zeros(1, 4, 32)}, "no input_ids"),
        (lambda batch: batch, "more rows than example_ids"),
    ],
)
def test_calls_that_cannot_be_sampled_are_refused(checkpoint: Path, model: Any, call: Any, complaint: str):
    batch = dict(encoded(checkpoint, *TEXTS.values()))
    with pytest.raises(CaptureError, match=complaint), sniffer.sniff(model, example_ids=[1, 2]):
        model(**call(batch))
    model(**batch)


def test_what_is_not_there_is_refused(checkpoint: Path, model: Any):
    with pytest.raises(ConfigError, match=r"capture.layers names \[7\]"), sniffer.sniff(model, layers=[7]):
        pass
    with sniffer.sniff(model, heads=[1]) as captured:
        model(**encoded(checkpoint, TEXTS["third"]))
    with pytest.raises(RunError, match="head 0 was not captured"):
        captured.vectors(layer=0, head=0)
    with pytest.raises(RunError, match="no statistics of attention were asked for"):
        captured.attention(layer=0, q_head=1)


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model], ids=["whole", "backbone"])
def test_a_compiled_model_shows_the_same(checkpoint: Path, model: Any, part: Any):
    batch = encoded(checkpoint, TEXTS["third"])
    with sniffer.sniff(part(model), sampler=All()) as plain:
        part(model)(**batch)
    compiled = torch.compile(part(model), backend="eager")
    compiled(**batch)
    with sniffer.sniff(compiled, sampler=All()) as captured:
        compiled(**batch)
    mine, theirs = (source.vectors(layer=1, head=3, kind="q") for source in (captured, plain))
    assert len(mine) and np.array_equal(mine.vectors, theirs.vectors)
    torch._dynamo.reset()


def test_layers_that_are_not_run_are_missed(checkpoint: Path, model: Any):
    batch = encoded(checkpoint, TEXTS["third"])
    with pytest.raises(CaptureError, match=r"layers \[1\] were not run"), sniffer.sniff(model):
        model.model.layers = model.model.layers[:1]
        model(**batch)


def test_the_name_stays_a_function():
    assert callable(sniffer.sniff) and callable(sniffer.sniff)
