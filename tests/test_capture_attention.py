"""Runs with statistics of attention: their rows are the queries', and live through all that a run may meet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from sniffer import open_run
from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.runs.export import export
from sniffer.runs.verify import verify
from sniffer.storage.manifest import Manifest
from sniffer.types import ALL_STATISTICS, STATISTICS
from tests.helpers_attention import from_weights
from tests.tiny_run import TEXTS

KEY = ["example_id", "position"]
EVERYTHING = ("sampler=all", "sampler.bucket_size=1", "capture.attention=[all,out]", "capture.attention_top=4")


def weights_of(checkpoint: Path, text: str) -> list[np.ndarray]:
    """(heads, tokens, tokens) of each layer, as the model returns them step by step."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)(text).input_ids])
    with torch.inference_mode():
        return [one[0].numpy() for one in model(input_ids=ids, output_attentions=True).attentions]


def test_rows_are_those_of_the_queries_and_hold_what_the_weights_say(run: Callable, checkpoint: Path):
    captured: Run = run(*EVERYTHING, "dataset.max_tokens=64", "capture.kinds=[q,v]")
    names = dict(captured.examples().select("source_id", "example_id").iter_rows())
    for name, text in TEXTS.items():
        for layer, weights in enumerate(weights_of(checkpoint, text[:64])):
            wanted = from_weights(weights)
            for head in range(4):
                rows = captured.attention(layer=layer, q_head=head).filter(pl.col("example_id") == names[name])
                rows = rows.sort("position")
                queries = captured.vectors(layer=layer, head=head, kind="q")
                mine = queries.example_ids == names[name]
                assert sorted(queries.positions[mine]) == rows["position"].to_list() == list(range(len(weights[0])))
                tokens = len(weights[0])
                for column in ("entropy", "first", "self", "sink"):
                    assert np.allclose(rows[column], wanted[column][:, head], atol=1e-5)
                assert np.allclose(rows["mass"].to_numpy()[:, :tokens], wanted["mass"][:, head], atol=1e-5)
                assert not rows["mass"].to_numpy()[:, tokens:].any()
                values = captured.vectors(layer=layer, head=head // 2, kind="v")
                values = values.vectors[values.example_ids == names[name]][np.argsort(values.positions[mine])]
                out = weights[head].astype(np.float64) @ values
                assert np.allclose(rows["out"].to_numpy(), out, atol=1e-5)
                assert np.allclose(rows["out_norm"], np.linalg.norm(out, axis=1), atol=1e-5)
                assert np.allclose(np.exp(rows["max_logit"] - rows["lse"]), weights[head].max(-1), atol=1e-5)
                assert rows["max_position"].to_list() == weights[head].argmax(-1).tolist()


def test_vectors_are_as_without(run: Callable):
    plain, more = run(), run("capture.attention=all")
    assert more.statistics == ALL_STATISTICS and plain.statistics == ()
    for layer, kinds in plain.manifest.digests.items():
        assert {kind: more.manifest.digests[layer][kind] for kind in kinds} == kinds
    assert plain.kinds == more.kinds == ("q", "k")
    assert plain.scan().collect().equals(more.scan().collect())
    footer = pq.read_schema(more.folder / more.manifest.parts_of(0, "attention")[0].path)
    assert "vector" not in footer.names


@pytest.mark.parametrize(
    "options", [(), ("output.checkpoint_every=1",), ("output.memory_limit=1KB",), ("output.compression=zstd",)]
)
def test_verify_reads_all_of_it_again(run: Callable, options: tuple[str, ...]):
    captured: Run = run("capture.attention=[all,out]", "sampler.base_rate=16", *options)
    assert verify(captured.folder)[1] == []
    parts = [part for part in captured.manifest.parts if part.kind == "attention"]
    assert sum(part.rows for part in parts) == captured.scan(kinds=["q"]).select(pl.len()).collect().item()
    table = pq.read_table(captured.folder / parts[0].path)
    changed = table.set_column(
        table.schema.get_field_index("entropy"), table.schema.field("entropy"), [table["entropy"].to_numpy() + 1]
    )
    pq.write_table(changed, captured.folder / parts[0].path)
    assert any(parts[0].path in line for line in verify(captured.folder)[1])


def test_shards_together_are_the_whole(run: Callable):
    whole: Run = run("capture.attention=all", "sampler.base_rate=16", "dataset.max_tokens=128")
    shards = [
        run(
            "capture.attention=all",
            "sampler.base_rate=16",
            "dataset.max_tokens=128",
            "dataset.shard.count=2",
            f"dataset.shard.index={index}",
        )
        for index in range(2)
    ]
    order = ["layer", "head", *KEY]
    together = pl.concat([one.scan(kind="attention").collect() for one in shards]).sort(order)
    alone = whole.scan(kind="attention").collect().sort(order)
    assert together.select(order).equals(alone.select(order)) and len(alone)
    for name in ("lse", "entropy", "out_norm"):
        assert np.allclose(together[name], alone[name], atol=1e-5)
    assert np.allclose(together["mass"].to_numpy(), alone["mass"].to_numpy(), atol=1e-5)


def test_some_heads_of_some_layers(run: Callable):
    every: Run = run("capture.attention=[entropy]", "sampler=all", "dataset.max_tokens=32")
    some: Run = run("capture.attention=entropy", "sampler=all", "dataset.max_tokens=32", "capture.heads=[1,3]")
    assert some.heads(1, "attention") == (1, 3)
    for head in (1, 3):
        assert some.attention(layer=1, q_head=head).equals(every.attention(layer=1, q_head=head))
    with pytest.raises(RunError, match="head 0 was not captured: layer 1, kind attention has heads 1, 3"):
        some.attention(layer=1, q_head=0)


def test_reading_says_what_is_not_there(run: Callable):
    plain, more = run(), run("capture.attention=first")
    with pytest.raises(RunError, match="kind attention was not captured"):
        plain.attention(layer=0, q_head=0)
    with pytest.raises(RunError, match="has no vectors: run.attention"):
        more.vectors(layer=0, head=0, kind="attention")
    with pytest.raises(RunError, match="scan them with kind='attention'"):
        more.scan(kinds=["q", "attention"])
    frame = more.scan(kind="attention", inclusion_probability=True).collect()
    assert frame.columns[-2:] == ["first", "inclusion_probability"]


def test_an_export_by_head_has_the_vectors(run: Callable, tmp_path: Path):
    captured: Run = run("capture.attention=first")
    export(captured.folder, tmp_path / "out")
    assert {folder.name[6:] for folder in (tmp_path / "out").iterdir()} == {"q", "k"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[lse,sinks]", "capture.attention names \\['sinks'\\]: take some of"),
        ("entrpy", "capture.attention names \\['entrpy'\\]"),
    ],
)
def test_unknown_statistics_are_named(run: Callable, value: str, said: str):
    with pytest.raises(ConfigError, match=said):
        run(f"capture.attention={value}")


def test_packed_texts_have_columns_for_all_of_their_tokens(run: Callable):
    """Of each text 20 tokens, of a document all of them: weights by bucket and distance are whole."""
    captured: Run = run(
        "sampler=all",
        "dataset.max_tokens=20",
        "dataset.pack_to=200",
        "dataset.pack_separator=none",
        "capture.attention=[mass,distance]",
    )
    rows = captured.scan(kind="attention").collect()
    assert rows["position"].max() > 40
    assert np.allclose(rows["mass"].to_numpy().sum(1), 1, atol=1e-5)
    assert np.allclose(rows["distance"].to_numpy().sum(1), 1, atol=1e-5)


def test_weights_by_section(run: Callable, tmp_path: Path):
    """Every position is a bucket: the weights of a section's keys are sums of those."""
    lines = [
        {"id": "a", "text": "one two three four five", "spans": [{"start": 4, "end": 13, "label": "middle"}]},
        {"id": "b", "text": "and another text", "spans": [{"start": 0, "end": 3, "label": "head"}]},
    ]
    path = tmp_path / "spans.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    captured: Run = run(
        f"dataset.path={path}",
        "dataset.spans_column=spans",
        "sampler=all",
        "sampler.bucket_size=1",
        "capture.attention=all",
        "capture.attention_sections=[head,middle,nowhere]",
    )
    names = dict(captured.examples().select("example_id", "source_id").iter_rows())
    for layer in range(2):
        rows = captured.attention(layer=layer, q_head=3)
        for example, mass, found in rows.select("example_id", "mass", "section_mass").iter_rows():
            inside = {"a": (0, sum(mass[4:13]), 0), "b": (sum(mass[:3]), 0, 0)}[names[example]]
            assert np.allclose(found, inside, atol=1e-6)
    assert verify(captured.folder)[1] == []
    with pytest.raises(ConfigError, match="capture.attention_sections=\\['head'\\]: documents here have no"):
        run("capture.attention=all", "capture.attention_sections=[head]")
    with pytest.raises(ConfigError, match="say which in capture.attention_sections"):
        run("capture.attention=section")


def test_other_bad_requests(run: Callable):
    with pytest.raises(ConfigError, match="not possible with model.compile=true"):
        run("capture.attention=all", "model.compile=true")
    with pytest.raises(ConfigError, match="attention_top=0 must be from 1"):
        run("capture.attention=all", "capture.attention_top=0")


def test_a_manifest_that_does_not_say_which_columns_is_broken(run: Callable):
    captured: Run = run("capture.attention=[lse,mass]")
    manifest = Manifest.load(captured.folder)
    for wrong, said in (
        (None, "does not say which"),
        ({**manifest.attention, "buckets": 99}, "numbers a row in layer 0, not those it names"),
        ({**manifest.attention, "statistics": ["lse", "colour"]}, "which this release does not know"),
    ):
        from dataclasses import replace

        from sniffer.storage.bounds import require_sense

        with pytest.raises(ValueError, match=said):
            require_sense(replace(manifest, attention=wrong))
    assert open_run(captured.folder).manifest == manifest
    assert set(STATISTICS) - set(ALL_STATISTICS) == {"out", "section"}


def test_scores_are_the_logits_of_captured_pairs(run: Callable, checkpoint: Path):
    """Of all pairs, softmax of the logits is the model's own weights, and so are the probabilities."""
    captured: Run = run("sampler=all", "dataset.max_tokens=40", "capture.attention=lse")
    names = dict(captured.examples().select("source_id", "example_id").iter_rows())
    for name, text in TEXTS.items():
        weights = weights_of(checkpoint, text[:40])
        for layer in range(2):
            for head in range(4):
                table = captured.scores(layer=layer, q_head=head, example_id=names[name])
                tokens = len(weights[layer][head])
                logits = table["logit"].to_numpy().reshape(tokens, tokens)
                powers = np.exp(logits)
                assert np.allclose(powers / powers.sum(1, keepdims=True), weights[layer][head], atol=1e-5)
                assert np.allclose(
                    table["probability"].to_numpy().reshape(tokens, tokens), weights[layer][head], atol=1e-5
                )
                assert (table["seen"] == (table["key_position"] <= table["query_position"])).all()


@pytest.mark.long
def test_sums_over_sampled_keys_are_unbiased(run: Callable):
    """Over many seeds, weights over inclusion probabilities add up to one, as all weights do."""
    sums: list[float] = []
    for seed in range(24):
        captured: Run = run(
            "sampler=uniform",
            "sampler.bucket_size=8",
            "sampler.base_rate=4",
            "dataset.max_tokens=64",
            "capture.attention=lse",
            "capture.layers=0",
            f"seed={seed}",
        )
        for (example,) in captured.examples().select("example_id").iter_rows():
            table = captured.scores(layer=0, q_head=1, example_id=example).filter("seen")
            share = table.with_columns(weight=pl.col("probability") / pl.col("key_inclusion_probability"))
            late = share.filter(pl.col("query_position") >= 8)
            sums += late.group_by("query_position").agg(pl.col("weight").sum())["weight"].to_list()
    error = np.std(sums) / np.sqrt(len(sums))
    assert len(sums) > 300 and abs(np.mean(sums) - 1) < 5 * error < 0.1


def test_scores_of_what_is_not_there(run: Callable):
    captured: Run = run("capture.attention=lse")
    with pytest.raises(RunError, match="0 queries and 0 keys of example 5"):
        captured.scores(layer=0, q_head=0, example_id=5)
    with pytest.raises(RunError, match="kind q was not captured"):
        run("capture.kinds=[k]").scores(layer=0, q_head=0, example_id=5)
