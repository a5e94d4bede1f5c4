"""Sections that are kept whole: for certain, whatever the rate, and nothing else changes."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniffer.cli.plan import needs
from sniffer.config.schema import PlanConfig
from sniffer.errors import ConfigError
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.law import check_law
from sniffer.runs.publish import assemble
from sniffer.runs.reproduce import reproduce
from sniffer.runs.verify import verify
from sniffer.sampler import All, LogUniform, Picker, Sampler, Uniform, describe
from sniffer.storage.examples import read_examples
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.types import Document, Rows, Sections, TokenBatch
from tests.helpers_runs import ORDER, Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint


@dataclass(frozen=True)
class FirstTokens(Sampler):
    """A user's own."""

    n_first: int = 4

    def bucket(self, positions: Any) -> Any:
        return (positions >= self.n_first).astype(np.int32)

    def probability(self, positions: Any) -> Any:
        return (positions < self.n_first).astype(np.float64)


KEEP = ["needle", "question"]
SAMPLERS = {
    "log_uniform": lambda keep, rate: LogUniform(base_rate=rate, min_bucket_size=8, keep_sections=keep),
    "uniform": lambda keep, rate: Uniform(base_rate=rate, bucket_size=8, keep_sections=keep),
    "all": lambda keep, rate: All(keep_sections=keep),
    "own": lambda keep, rate: FirstTokens(keep_sections=keep),
}


def document(labels: list[str], number: int = 5) -> Document:
    spans = [(place, place + 1, label) for place, label in enumerate(labels) if label]
    return Document(
        number, str(number), np.zeros(len(labels), np.int32), False, sections=Sections.spread(spans, len(labels))
    )


LABELS = st.lists(st.sampled_from(["", "hay", *KEEP]), min_size=1, max_size=60)


@pytest.mark.parametrize("name", SAMPLERS)
@given(LABELS, st.integers(0, 9), st.sampled_from(["q", "k"]))
def test_what_is_kept_is_the_draw_and_the_sections(name: str, labels: list[str], layer: int, draw: str):
    mine = document(labels)
    plain, keeping = (Picker(SAMPLERS[name](keep, 2.0), 3) for keep in ([], KEEP))
    drawn = set(plain.positions(mine, layer, draw).tolist())
    certain = {place for place, label in enumerate(labels) if label in KEEP}
    assert keeping.positions(mine, layer, draw).tolist() == sorted(drawn | certain)


@given(st.lists(LABELS, min_size=1, max_size=6), st.integers(0, 3))
def test_documents_are_drawn_together_as_they_are_alone(documents: list[list[str]], layer: int):
    batch = TokenBatch(tuple(document(labels, number) for number, labels in enumerate(documents)), pad_id=0)
    picker = Picker(SAMPLERS["uniform"](KEEP, 1.0), 3)
    picks = picker.pick(batch, layer, "q")
    for row, one in enumerate(batch.documents):
        assert picks.positions[picks.rows == row].tolist() == picker.positions(one, layer, "q").tolist()
    names = batch.sections(picks)
    assert names is not None
    expected = [documents[row][position] for row, position in zip(picks.rows, picks.positions, strict=True)]
    assert names.array.tolist() == expected


@given(LABELS, st.integers(0, 5))
def test_rates_nest(labels: list[str], layer: int):
    found = [
        set(Picker(SAMPLERS["log_uniform"](KEEP, rate), 1).positions(document(labels), layer, "k").tolist())
        for rate in (0.0, 0.5, 1.0, 4.0, 1e9)
    ]
    assert all(fewer <= more for fewer, more in zip(found, found[1:], strict=False))
    assert found[0] == {place for place, label in enumerate(labels) if label in KEEP}


@given(st.lists(LABELS, min_size=1, max_size=5))
def test_as_many_are_expected_as_the_law_says(documents: list[list[str]]):
    sampler = SAMPLERS["uniform"](KEEP, 2.0)
    made = [document(labels) for labels in documents]
    expected = Picker(sampler, 0).expected([one.n_tokens for one in made], [one.sections for one in made])
    by_hand = sum(1.0 if label in KEEP else 2.0 / 8 for labels in documents for label in labels)
    assert expected == pytest.approx(by_hand)


def test_documents_without_sections_are_refused():
    bare = replace(document(["hay"] * 9), sections=None)
    with pytest.raises(ConfigError, match=r"keep_sections=\['needle', 'question'\]: these documents have no sections"):
        Picker(SAMPLERS["uniform"](KEEP, 0.0), 0).positions(bare, 0, "q")


@pytest.mark.parametrize("keep", [["a", "a"], [""]])
def test_names_make_sense(keep: list[str]):
    with pytest.raises(ConfigError, match="must be names of sections, each once"):
        LogUniform(keep_sections=keep)


def test_a_sampler_that_keeps_none_is_described_as_before():
    assert "keep_sections" not in describe(LogUniform())
    assert describe(LogUniform(keep_sections=KEEP))["keep_sections"] == KEEP


ROWS = [
    {
        "id": f"doc-{n}",
        "text": "hay " * (5 * n) + "needle" + " straw" * (30 - 3 * n),
        "spans": [{"start": 20 * n, "end": 20 * n + 6, "label": "needle"}],
    }
    for n in range(8)
]
SPANS = ("dataset.spans_column=spans", "sampler.base_rate=4")
NEEDLE = (*SPANS, "sampler.keep_sections=[needle]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("kept")
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Runs(save_checkpoint(place / "model"), place / "texts.jsonl", place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.start("whole", *NEEDLE)


def test_a_run_has_every_position_of_the_section_and_the_draw_of_the_rest(runs: Runs, whole: Path):
    assert verify(whole)[1] == []
    plain, kept = rows(runs.start("plain", *SPANS)), rows(whole)
    assert kept.filter(pl.col("section") != "needle").equals(plain.filter(pl.col("section") != "needle"))
    needles = kept.filter(section="needle")
    assert len(needles) == 8 * 6 * 2 * (4 + 2)  # documents, tokens, layers, heads of q and k
    assert len(plain.filter(section="needle")) < len(needles) / 4


def test_weights_are_right(runs: Runs, whole: Path):
    """Rows weighted by their inverse probability count all positions: those of the section exactly."""
    run = open_run(whole)
    assert isinstance(run, Run)
    found = run.scan(inclusion_probability=True).collect()
    law = run.manifest.probability_by_bucket("q")
    expected = [1.0 if section == "needle" else law[bucket] for section, bucket in found["section", "bucket"].rows()]
    assert found["inclusion_probability"].to_list() == expected and min(law.values()) < 1
    head = found.filter(layer=0, kind="q", head=0)
    assert (1 / head.filter(section="needle")["inclusion_probability"]).sum() == 8 * 6
    vectors = run.vectors(layer=0, head=0)
    assert vectors.inclusion_probability.tolist() == [
        1.0 if section == "needle" else law[bucket]
        for section, bucket in zip(vectors.sections, vectors.buckets.tolist(), strict=True)  # type: ignore[arg-type]
    ]
    pairs = run.pairs(layer=0, q_head=0)
    assert pairs.inclusion_probability.tolist() == [
        1.0 if section == "needle" else law[bucket] ** 2
        for section, bucket in zip(pairs.sections, pairs.buckets.tolist(), strict=True)  # type: ignore[arg-type]
    ]
    assert (pairs.sections == "needle").sum() == 8 * 6


def test_the_estimate_is_unbiased_over_seeds():
    """The number of positions, of the section and in all, as seen from the rows of many draws."""
    labels = (["hay"] * 40 + ["needle"] * 5 + [""] * 55) * 2
    mine = document(labels)
    sampler = SAMPLERS["uniform"](["needle"], 2.0)
    totals = []
    for seed in range(400):
        picked = Picker(sampler, seed).positions(mine, 0, "q")
        totals.append(sum(1.0 if labels[place] == "needle" else 8 / 2.0 for place in picked.tolist()))
    assert np.mean(totals) == pytest.approx(len(labels), rel=0.02)


def test_the_estimate_before_a_run_counts_them(runs: Runs, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        folder = runs.start("expected", *SPANS, "sampler.base_rate=0", "sampler.keep_sections=[needle]")
    assert len(rows(folder)) == 8 * 6 * 2 * 6
    assert f"expecting {8 * 6 * 2 * 6:,} vectors" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("output.memory_limit=1kB",), ("dataset.window=40", "dataset.stride=20")])
def test_stopped_sharded_and_reproduced_runs_hold(runs: Runs, more: tuple[str, ...], tmp_path: Path):
    name = "-".join(more).replace("/", "") or "plain-options"
    small = (*NEEDLE, *more, "batch.max_tokens=60")
    once = runs.start(f"{name}-once", *small)
    stopped = runs.start(f"{name}-stopped", *small, "output.checkpoint_every=2", stop_after=2)
    assert verify(stopped)[1] == [] and take_up(stopped)
    must_be_whole(stopped, once)
    shards = [runs.start(f"{name}-{n}", *small, "dataset.shard.count=2", f"dataset.shard.index={n}") for n in range(2)]
    assert [verify(shard)[1] for shard in shards] == [[], []]
    assert pl.concat(map(rows, shards)).sort(ORDER).drop("vector").equals(rows(once).drop("vector"))
    from sniffer.config.trust import Trust

    assert reproduce(once, tmp_path / "again", Trust())[0]


def test_each_side_keeps_its_own(runs: Runs):
    """Needles of the queries, and no more keys than a run with that sampler alone."""
    each = ("sampler.q.base_rate=2", "sampler.k.base_rate=3", "sampler@sampler.k=log_uniform")
    spans = "dataset.spans_column=spans"
    given = ["sampler=per_side", spans, *each]
    keeping = start(runs, "sides", *given, "sampler.q.keep_sections=[needle]")
    plain = start(runs, "sides-plain", *given)
    assert verify(keeping)[1] == [] and verify(plain)[1] == []
    found, bare = rows(keeping), rows(plain)
    assert found.filter(kind="k").equals(bare.filter(kind="k"))
    others = pl.col("section") != "needle"
    assert found.filter(others, kind="q").equals(bare.filter(others, kind="q"))
    assert len(found.filter(section="needle", kind="q", head=0, layer=0)) == 8 * 6
    run = open_run(keeping)
    assert isinstance(run, Run)
    weights = (
        run.scan(inclusion_probability=True).select("kind", "section", "inclusion_probability", "bucket").collect()
    )
    for kind, section, probability, bucket in weights.iter_rows():
        certain = kind == "q" and section == "needle"
        assert probability == (1.0 if certain else run.manifest.probability_by_bucket(kind)[bucket])
    pairs = run.pairs(layer=0, q_head=0)
    law = {kind: run.manifest.probability_by_bucket(kind) for kind in ("q", "k")}
    expected = [
        (1.0 if section == "needle" else law["q"][bucket]) * law["k"][bucket]
        for section, bucket in zip(pairs.sections, pairs.buckets.tolist(), strict=True)  # type: ignore[arg-type]
    ]
    assert pairs.inclusion_probability.tolist() == pytest.approx(expected)


def start(runs: Runs, name: str, *given: str) -> Path:
    """Without the sampler's keys that other runs here have."""
    from hydra import compose, initialize_config_dir

    from sniffer import capture
    from sniffer.config.resolve import conf_folder, register, resolve
    from tests.helpers_config import save_config
    from tests.tiny_run import overrides

    register()
    folder = runs.place / name
    folder.mkdir()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("config", overrides(runs.checkpoint, runs.texts, *given))
    save_config(folder, cfg)
    capture.run(resolve(cfg), folder)
    return folder


def test_a_law_without_its_sections_is_found_out(whole: Path, tmp_path: Path):
    import shutil

    copy = shutil.copytree(whole, tmp_path / "copy")
    manifest = Manifest.load(copy)
    sampler = {key: value for key, value in manifest.sampler.items() if key != "keep_sections"}
    replace(manifest, sampler=sampler).save(copy)
    assert [problem for problem in verify(copy)[1] if "its footer says sampler" in problem]
    # And whatever the footers say, the draws are others.
    table = rows(whole).filter(layer=0, kind="q", head=0).sort("example_id", "position")
    examples = read_examples(whole / RunFolder.EXAMPLES)
    for keep in (["needle"], []):
        picker = Picker(LogUniform(base_rate=4.0, min_bucket_size=128, keep_sections=keep), manifest.seed)
        told = list(check_law(picker, examples, 0, "q", Rows.from_columns(table)))
        assert (told == []) == bool(keep) and all("positions that the law does not keep" in line for line in told)


def test_sections_that_cannot_be_kept_are_told(runs: Runs, caplog: pytest.LogCaptureFixture):
    with pytest.raises(ConfigError, match="documents of this dataset have no sections, which come with chats"):
        runs.start("none", "sampler.keep_sections=[needle]")
    with pytest.raises(ConfigError, match="names 'nedle', a section of no document: there are 'needle'"):
        runs.start("typo", *SPANS, "sampler.keep_sections=[needle,nedle]")
    shard = ("dataset.shard.count=2", "dataset.shard.index=1")
    runs.start("shard", *SPANS, "sampler.keep_sections=[needle,nedle]", *shard)
    assert "sampler.keep_sections names 'nedle', and no document here has that section" in caplog.text


def test_a_plan_counts_them(runs: Runs):
    from hydra import compose, initialize_config_dir

    from sniffer.config.resolve import conf_folder, register, resolve
    from tests.tiny_run import overrides

    def planned(*more: str) -> float:
        register()
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = resolve(
                compose("config", overrides(runs.checkpoint, runs.texts, *NEEDLE, "sampler.base_rate=0", *more))
            )
        return needs(config, PlanConfig()).expected.vectors

    assert planned() == 8 * 6 * 2 * 6
    # Unread, at most all tokens are of the section.
    assert planned("dataset.max_examples=3", "dataset.max_tokens=50") == 3 * 50 * 2 * 6


def test_what_is_published_says_so(whole: Path, tmp_path: Path):
    assemble(whole, tmp_path / "published", "someone/run")
    assert "Positions of these sections are all kept: needle." in (tmp_path / "published" / "README.md").read_text()


def test_a_notebook_has_no_sections():
    from sniffer.notebook.sniffing import sniff

    with (
        pytest.raises(ConfigError, match="documents of calls have no sections"),
        sniff(object(), sampler=LogUniform(keep_sections=["a"])),
    ):
        pass
