"""A sampler for each side keeps of each side what that sampler alone would keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hydra import compose, initialize_config_dir

from sniffer.config.resolve import conf_folder, register, resolve
from sniffer.config.trust import Trust
from sniffer.errors import ConfigError
from sniffer.forward.attention.layout import layout_of
from sniffer.forward.estimate import estimate
from sniffer.forward.selection import CaptureConfig, Selection
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs import __main__ as command
from sniffer.runs.card import Place, card
from sniffer.runs.law import check_law
from sniffer.runs.reproduce import reproduce
from sniffer.runs.verify import verify
from sniffer.sampler import All, LogUniform, PerSide, Picker, Sampler, Uniform, describe, picker_of
from sniffer.sampler.base import check_sampler
from sniffer.storage.schema import Example
from sniffer.types import Document, LayerGeometry, Rows, TokenBatch
from tests.helpers_runs import Runs
from tests.test_sampler import by_definition
from tests.tiny_run import TEXTS, save_checkpoint, save_texts

Q, K = LogUniform(base_rate=4.0, min_bucket_size=8), Uniform(base_rate=9.0, bucket_size=32, seed_by=["example"])
BOTH = PerSide(q=Q, k=K)
KEY = ["layer", "kind", "head", "example_id", "position"]


def document(n_tokens: int, example_id: int = 5) -> Document:
    return Document(example_id, str(example_id), np.zeros(n_tokens, np.int32), False)


@pytest.mark.parametrize(("draw", "side"), [("q", Q), ("k", K)])
def test_each_side_keeps_what_its_law_keeps(draw: str, side: Sampler) -> None:
    picker, members = picker_of(BOTH, 7), (document(300, 1), document(11, 2), document(77, 3))
    picks = picker.pick(TokenBatch(members, pad_id=0), 2, draw)
    for row, member in enumerate(members):
        expected = by_definition(side, 7, member, 2, draw)
        assert picks.positions[picks.rows == row].tolist() == expected
        assert picker.positions(member, 2, draw).tolist() == expected
    assert (picks.buckets == side.bucket(picks.positions.astype(np.int64))).all()
    assert picker.side(draw).sampler == side and Picker(side, 7).side(draw).sampler == side


def test_it_is_recorded_side_by_side() -> None:
    check_sampler(BOTH)
    assert describe(BOTH) == {"_target_": "sniffer.sampler.PerSide", "q": describe(Q), "k": describe(K)}
    for ask in (picker_of(BOTH, 0).span, picker_of(BOTH, 0).probability_by_bucket, BOTH.bucket, BOTH.probability):
        with pytest.raises(TypeError, match="side"):
            ask(1)


def test_what_is_expected_follows_from_each_law() -> None:
    lengths, selection = [100, 300], Selection({(0, "q"): (0, 1), (0, "k"): (0,), (0, "v"): (0,)})
    geometry = {0: LayerGeometry(0, "", {"q": 2, "k": 1, "v": 1}, {"q": 4, "k": 4, "v": 4}, None, None)}
    told = estimate(picker_of(PerSide(q=Q, k=All()), 0), selection, geometry, lengths, 2, 4, 512, 4.0)
    positions = [np.arange(n) for n in lengths]
    wanted = 2 * sum(Q.probability(some).sum() for some in positions)
    assert told.rows == {"q": pytest.approx(wanted), "k": 400, "v": 400}
    alone = estimate(picker_of(All(), 0), selection, geometry, lengths, 2, 4, 512, 4.0)
    assert told.ram_bytes < alone.ram_bytes and told.batch_bytes <= alone.batch_bytes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("runs")
    return Runs(save_checkpoint(place / "checkpoint"), save_texts(place / "texts.jsonl", TEXTS), place)


def alone(runs: Runs, name: str, *more: str) -> Run:
    # Of the helpers' words, the rate is log_uniform's alone.
    found = open_run(start(runs, name, *more))
    assert isinstance(found, Run)
    return found


def start(runs: Runs, name: str, *more: str) -> Path:
    import tests.helpers_runs as helpers

    before, helpers.LAW = helpers.LAW, ("batch.max_tokens=300",)
    try:
        return runs.start(name, "capture.kinds=[q,k,v,q_pre]", *more)
    finally:
        helpers.LAW = before


@pytest.fixture(scope="module")
def both(runs: Runs) -> Run:
    return alone(runs, "both", "sampler=per_side", "sampler.q.base_rate=30")


def rows(run: Run, kinds: list[str]) -> pl.DataFrame:
    return run.scan(kinds=kinds, inclusion_probability=True).sort(KEY).collect()


def test_rows_are_those_of_two_runs(runs: Runs, both: Run) -> None:
    queries = alone(runs, "queries", "sampler=log_uniform", "sampler.base_rate=30")
    keys = alone(runs, "keys", "sampler=all")
    assert rows(both, ["q", "q_pre"]).equals(rows(queries, ["q", "q_pre"]))
    assert rows(both, ["k", "v"]).equals(rows(keys, ["k", "v"]))
    assert 0 < both.manifest.rows_by_kind["q"] < queries.manifest.counts["tokens"] * 8
    mixed = both.scan(inclusion_probability=True).collect()
    assert mixed["inclusion_probability"].null_count() == 0
    apart = pl.concat([rows(both, ["q", "q_pre"]), rows(both, ["k", "v"])])
    assert mixed.sort(KEY).equals(apart.sort(KEY))


def test_every_query_has_its_key_and_the_probability_of_both(both: Run) -> None:
    pairs = both.pairs(layer=1, q_head=3)
    queries = both.vectors(layer=1, head=3, kind="q")
    assert len(pairs.q) == len(queries.vectors) and (pairs.inclusion_probability == queries.inclusion_probability).all()
    assert (both.vectors(layer=1, head=0, kind="k").inclusion_probability == 1).all()


@pytest.mark.parametrize(
    ("seeds", "together"),
    [
        (("[example]", "[example]"), np.minimum),
        (("[example]", "[example,layer]"), np.multiply),
        (("[example,kind]", "[example,kind]"), np.multiply),
    ],
)
def test_pairs_of_two_sampled_sides(runs: Runs, seeds: tuple[str, str], together: Any, tmp_path: Path) -> None:
    rates = "sampler.q.base_rate=40", "sampler@sampler.k=uniform", "sampler.k.base_rate=64"
    seeded = [f"sampler.{side}.seed_by={seed}" for side, seed in zip("qk", seeds, strict=True)]
    run = alone(runs, "-".join(seeds), "sampler=per_side", *rates, *seeded)
    pairs = run.pairs(layer=0, q_head=0)
    q, k = LogUniform(base_rate=40.0), Uniform(base_rate=64.0)
    positions = pairs.positions.astype(np.int64)
    assert len(positions)
    expected = together(q.probability(positions), k.probability(positions))
    assert np.allclose(pairs.inclusion_probability, expected, rtol=1e-12)
    assert not verify(run.folder)[1]


def test_verify_draws_each_side_anew(both: Run) -> None:
    assert not verify(both.folder)[1]
    examples = {row["example_id"]: Example(**row) for row in both.examples().to_dicts()}
    other = picker_of(PerSide(q=LogUniform(base_rate=30.0), k=LogUniform(base_rate=30.0)), 0)
    for kind, wrong in (("q", False), ("k", True), ("v", True)):
        table = both.scan([1], [kind]).filter(pl.col("head") == 0).sort("bucket", "example_id", "position").collect()
        told = "; ".join(check_law(other, examples, 1, kind, Rows.from_columns(table)))
        assert ("positions that the law does not keep" in told) is wrong, told


def test_a_run_is_told_of_side_by_side(both: Run, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["inspect", str(both.folder)]) == 0
    told = capsys.readouterr().out
    assert "q LogUniform(30.0, 128), k All(128), seed 0" in told
    assert "vectors by bucket, q, q_pre" in told and "vectors by bucket, k, v" in told
    text = card(both.manifest, Place("owner/name"), None)
    assert "Queries: sampler LogUniform (base_rate 30.0, min_bucket_size 128, seed 0)" in text
    assert "Keys and values: sampler All (bucket_size 128, seed 0): bucket(p) = floor(p / bucket_size)" in text


def test_it_reproduces_itself(both: Run, tmp_path: Path) -> None:
    same, told = reproduce(both.folder, tmp_path / "again", Trust())
    assert same, told


def config(*words: str) -> Any:
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return resolve(compose("config", ["sampler=per_side", *words])).sampler


def test_each_side_has_its_own_choice_and_keys() -> None:
    assert config() == PerSide(q=LogUniform(), k=All())
    made = config("sampler@sampler.q=uniform", "sampler.q.bucket_size=64", "sampler.k.bucket_size=32")
    assert made == PerSide(q=Uniform(bucket_size=64), k=All(bucket_size=32))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sampler.q.base_rate=-1", r"sampler\.q\.base_rate=-1\.0 must be a finite number"),
        ("sampler.k._target_=os.system", r"sampler\.k\._target_=os\.system is outside"),
        ("sampler.k=null", r"sampler\.k must name its class in sampler\.k\._target_"),
        ("+sampler.q.rate=1", r"sampler\.q\.rate is not a key: did you mean base_rate"),
        ("sampler@sampler.q=per_side", r"sampler\.q is no sampler for one side: choose with sampler@sampler\.q=all"),
    ],
)
def test_a_wrong_side_is_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(word)


def test_what_attention_gives_by_bucket_is_by_the_buckets_of_keys() -> None:
    layout = layout_of(CaptureConfig(attention="all"), picker_of(BOTH, 0), 300)
    assert layout is not None and layout.buckets == 1 + 299 // 32


def test_rows_are_counted_side_by_side(both: Run) -> None:
    told = json.loads((both.folder / "manifest.json").read_text())["rows"]["by_bucket"]
    for side, kinds in (("q", ["q", "q_pre"]), ("k", ["k", "v"])):
        counted = dict(both.scan(kinds=kinds).group_by("bucket").len().sort("bucket").collect().iter_rows())
        assert told[side] == {str(bucket): n for bucket, n in counted.items()}
