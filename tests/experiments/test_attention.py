"""Numbers of heads are those of planted weights, and of the weights that a model returns itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sniffer.experiments.attention import Attention
from sniffer.experiments.attention.core import (
    Attending,
    induction,
    mean_distance,
    near,
    previous,
    relative_entropy,
    types_of,
)
from sniffer.experiments.common import entry
from sniffer.experiments.report.collect import collect
from sniffer.experiments.report.glossary import ABOUT

from sniffer.errors import ConfigError, RunError
from tests.tiny_run import TEXTS

N = 16
TOKENS = np.array([5, 6, 7, 8] * 4)


def attending(weights: np.ndarray, sinks: np.ndarray | None = None) -> Attending:
    """From weights (heads, queries, keys), every position a query."""
    heads = len(weights)
    sink = np.zeros((heads, N)) if sinks is None else sinks
    distance = np.zeros((heads, N, 5))
    for query in range(N):
        for key in range(query + 1):
            distance[:, query, int(np.log2(1 + query - key))] += weights[:, query, key]
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return Attending(
        heads=tuple(range(heads)),
        entropy=-(weights * logs).sum(2),
        first=weights[:, :, 0],
        itself=np.stack([weights[:, n, n] for n in range(N)], axis=1),
        sink=sink,
        distance=distance,
        key=weights.argmax(2),
        out_norm=np.ones((heads, N)),
        positions=np.arange(N, dtype=np.int32),
        example_ids=np.full(N, 3),
        weights=np.ones(N),
    )


def one_hot(key_of: Callable[[int], int]) -> np.ndarray:
    weights = np.zeros((N, N))
    for query in range(N):
        weights[query, max(0, key_of(query))] = 1
    return weights


PLANTED = {
    "sink": one_hot(lambda query: 0),
    "previous": one_hot(lambda query: query - 1),
    "induction": one_hot(lambda query: query - 3),  # tokens come again after four
    "local": np.stack([np.concatenate([np.full(n + 1, 1 / (n + 1)), np.zeros(N - n - 1)]) for n in range(N)]),
    "mixed": one_hot(lambda query: query // 2),
}


def test_planted_heads_are_called_by_their_names():
    found = attending(np.stack(list(PLANTED.values())))
    candidates, able = induction(found, {3: TOKENS})
    numbers = {
        "first": found.mean(found.first),
        "sink": found.mean(found.sink),
        "previous": previous(found),
        "induction": candidates,
        "near": near(found, 15),
    }
    assert able == N - 4 and candidates[2] == 1.0 and candidates[1] == 0.0
    assert previous(found)[1] == 1.0 and found.mean(found.first)[0] == 1.0
    everything_is_near = {**numbers, "near": near(found, 3)}
    assert types_of(everything_is_near, 0.5) == ["sink", "previous", "induction", "mixed", "mixed"]
    assert types_of(numbers, 0.5)[3] == "local"


def test_sinks_that_are_learned_count_as_sinks():
    weights = PLANTED["mixed"][None] * 0.3
    found = attending(weights, np.full((1, N), 0.7))
    numbers = dict.fromkeys(("first", "previous", "induction", "near"), np.zeros(1)) | {"sink": found.mean(found.sink)}
    assert types_of(numbers, 0.5) == ["sink"]
    assert mean_distance(found)[0] == pytest.approx(mean_distance(attending(PLANTED["mixed"][None]))[0])


def test_equal_weights_have_all_the_entropy_and_one_key_has_none():
    found = attending(np.stack([PLANTED["local"], PLANTED["previous"]]))
    assert relative_entropy(found) == pytest.approx([1.0, 0.0])


def test_the_mean_distance_by_definition():
    found = attending(np.stack(list(PLANTED.values())))
    for head, weights in enumerate(PLANTED.values()):
        total = sum(
            weights[query, key] * int(np.log2(1 + query - key)) for query in range(N) for key in range(query + 1)
        )
        assert mean_distance(found)[head] == pytest.approx(total / N)


def test_a_run_gives_what_the_models_own_weights_give(run: Callable, checkpoint: Path):
    """All positions of three documents, whose weights the model returns step by step in another forward."""
    from transformers import AutoModel, AutoTokenizer

    captured = run("sampler=all", "dataset.max_tokens=64", "capture.attention=all")
    heads = Attention().measure(captured).tables["heads"]
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    first, before, entropies, lengths = [], [], [], []
    for text in TEXTS.values():
        ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)(text[:64]).input_ids])
        with torch.inference_mode():
            weights = torch.stack(model(input_ids=ids, output_attentions=True).attentions)[:, 0].double().numpy()
        n = weights.shape[-1]
        first.append(weights[..., 0])
        before.append(weights.argmax(-1)[..., 1:] == np.arange(n - 1))
        logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
        entropies.append(-(weights * logs).sum(-1))
        lengths.append(n)
    assert heads["rows"].to_list() == [sum(lengths)] * 8
    for name, values in (("first", first), ("previous", before), ("entropy", entropies)):
        wanted = np.concatenate(values, axis=2).mean(2).reshape(-1)
        assert np.allclose(heads[name], wanted, atol=1e-5), name
    assert heads["induction"].null_count() == 0
    without = run("sampler=all", "dataset.max_tokens=64", "capture.attention=all", "output.tokens=false")
    result = Attention().measure(without)
    assert result.tables["heads"]["induction"].null_count() == 8
    assert any("output.tokens=true" in line for line in result.findings)
    assert set(result.figures) == {"entropy_map", "first_map", "types", "distances", "by_layer"}


def test_its_maps_are_on_the_page_with_what_they_mean(run: Callable):
    captured = run("sampler=all", "dataset.max_tokens=64", "capture.attention=all")
    assert entry.main("attention", [f"run={captured.folder}"]) == 0
    job = collect(captured, {}, 0)
    assert [one["analysis"] for one in job["findings"]] == ["attention"]
    named = {f"attention.{one['name']}" for one in job["maps"] if one["analysis"] == "attention"}
    assert {name for name in ABOUT if name.startswith("attention.")} == named
    assert all(one["about"] for one in job["maps"])


def test_queries_of_a_section_over_all_keys(run: Callable, tmp_path: Path):
    asked = [{"id": str(n), "question": f"where is cat {n}? ", "answer": "on the mat. " * n} for n in range(1, 4)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    text = f"dataset.path={tmp_path / 'qa.jsonl'}", "dataset.text_column=[question,answer]"
    captured = run("sampler=all", "capture.attention=all", *text)
    found = Attention(sections=["answer"]).measure(captured)
    rows = captured.scan(kind="attention").collect()
    mine = rows.filter(section="answer").group_by("layer", "head").agg(pl.col("first").mean(), pl.len())
    heads = found.tables["heads"].join(mine, on=["layer", "head"], suffix="_wanted")
    assert len(heads) == 8 and np.allclose(heads["first"], heads["first_wanted"])
    assert (heads["rows"] == heads["len"]).all() and 0 < heads["rows"][0] < len(rows) // 8
    out = tmp_path / "out"
    assert entry.main("attention", [f"run={captured.folder}", f"out={out}", "sections=[answer]"]) == 0
    assert (out / "findings.txt").read_text().startswith("Of the rows of these sections only: answer.\n")
    with pytest.raises(RunError, match="section 'middle' is in no document"):
        Attention(sections=["middle"]).measure(captured)


def test_bad_settings_and_runs_are_one_line(run: Callable):
    with pytest.raises(ConfigError, match="one less than a power of two"):
        Attention(local=8)
    with pytest.raises(ConfigError, match="must lie between 0 and 1"):
        Attention(threshold=0.0)
    with pytest.raises(
        RunError, match="has no entropy, max_logit, .* of attention: capture with capture.attention=all"
    ):
        Attention().measure(run())
