"""Analyses of some sections see the rows of these, and say so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sniffer.experiments.common import entry
from sniffer.experiments.common.rows import load, of_sections
from sniffer.experiments.key_rank import KeyRank

from sniffer.errors import ConfigError
from sniffer.reader.run import Run
from sniffer.types import Sections
from tests.experiments.planted import DIM, noise, planted_run

NAMES = (
    "position_geometry",
    "attention_plasticity",
    "key_rank",
    "quantisation",
    "rope_frequencies",
    "query_key_gap",
    "query_groups",
)
SETTINGS = {
    "query_key_gap": ("recall=false",),
    "attention_plasticity": ("pairs=prefix", "min_rows=4"),
    "rope_frequencies": ("layout=half", f"rotary={DIM}"),
}


def halves(n_tokens: int) -> Sections:
    return Sections.spread([(0, n_tokens // 2, "early"), (n_tokens // 2, n_tokens, "late")], n_tokens)


def flat_early(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Before position 100, which is early in each document, vectors lie on a line."""
    vectors = noise(layer, kind, positions, rng)
    return np.where(positions[:, None, None] < 100, vectors * np.eye(DIM)[0], vectors)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("sections") / "run"
    kinds, lengths = ("q", "k", "q_pre", "k_pre"), (300, 200, 256)
    return planted_run(folder, flat_early, kinds=kinds, lengths=lengths, sections=halves)


@pytest.mark.parametrize("kind", ["q", "k"])
def test_the_rows_of_a_section_are_those_where_it_is(run: Run, kind: str):
    whole, some = load(run, 1, kind), load(of_sections(run, ["late"]), 1, kind)
    lengths = dict(run.examples().select("example_id", "n_tokens").rows())
    half = np.array([lengths[number] // 2 for number in whole.example_ids.tolist()])
    mine = whole.take(whole.positions >= half)
    assert 0 < len(some) < len(whole)
    for name in ("vectors", "positions", "buckets", "example_ids", "weights"):
        assert np.array_equal(getattr(some, name), getattr(mine, name))


def test_an_analysis_measures_that_section(run: Run):
    ranks = {
        name: KeyRank(sections=[name]).measure(run).tables["heads"].filter(kind="k")["rank"]
        for name in ("early", "late")
    }
    assert ranks["early"].max() < ranks["late"].min()
    both = KeyRank(sections=["late", "early"]).measure(run).tables["heads"]
    assert both.equals(KeyRank().measure(run).tables["heads"])


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_analysis_takes_sections_and_says_so(run: Run, tmp_path: Path, name: str):
    out = tmp_path / "out"
    words = [f"run={run.folder}", f"out={out}", "sections=[late]", *SETTINGS.get(name, ())]
    assert entry.main(name, words) == 0
    assert (out / "findings.txt").read_text().startswith("Of the rows of these sections only: late.\n")
    assert json.loads((out / "provenance.json").read_text())["settings"]["sections"] == ["late"]


@pytest.mark.parametrize("name", NAMES)
def test_a_section_that_is_not_there_is_one_line(run: Run, name: str, capsys: pytest.CaptureFixture[str]):
    assert entry.main(name, [f"run={run.folder}", "sections=[middle]"]) == 1
    told = capsys.readouterr().err
    assert f"section 'middle' is in no document: {run.folder} has 'early', 'late'" in told and told.count("\n") == 1


def test_a_run_without_sections_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bare = planted_run(tmp_path / "bare")
    assert entry.main("key_rank", [f"run={bare.folder}", "sections=[late]"]) == 1
    assert "has no sections: capture with some" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="names nothing"):
        of_sections(bare, [])


def test_sampling_error_has_no_such_key(run: Run, capsys: pytest.CaptureFixture[str]):
    assert entry.main("sampling_error", [f"run={run.folder}", "sections=[late]"]) == 1
    assert "sampling_error.sections is not a key" in capsys.readouterr().err
