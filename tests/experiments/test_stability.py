"""Coefficients of agreement are the textbooks'; what depends on the text and what does not are told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats
from sniffer.experiments.common import entry
from sniffer.experiments.stability import Stability, steady
from sniffer.experiments.stability.core import agreement, concordance, rank_correlation, spread

from sniffer.types import Sections
from tests.experiments.planted import DIM, HEADS, planted_run

JUDGED = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], dtype=float)
"""Six targets by four judges, with ICC(2,1) = 0.29 and ICC(3,1) = 0.71 (Shrout and Fleiss, 1979, tables 2 and 4)."""


def test_agreement_is_that_of_shrout_and_fleiss():
    absolute, consistent = agreement(JUDGED)
    assert round(absolute[0], 2) == 0.29 and round(consistent[0], 2) == 0.71
    counts = np.array([2, 1, 0, 1, 3, 1])
    repeated = agreement(np.repeat(JUDGED, counts, axis=0))
    drawn = agreement(JUDGED, counts[None].astype(float))
    assert np.allclose(drawn, repeated)


def test_the_same_numbers_agree_and_a_shift_is_only_consistent():
    x = np.random.default_rng(0).normal(size=50)
    assert agreement(np.stack([x, x], axis=1))[0] == pytest.approx([1])
    shifted = agreement(np.stack([x, x + 3], axis=1))
    assert shifted[1] == pytest.approx([1]) and shifted[0] < 0.5
    assert np.isnan(agreement(np.ones((5, 2)))[0]).all()
    noise = agreement(np.random.default_rng(1).normal(size=(20_000, 2)))
    assert abs(noise[0][0]) < 0.03


def test_coefficients_of_two_texts():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 40))
    y += x
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert concordance(x, x) == pytest.approx(1) and concordance(x, -x + 2 * x.mean()) == pytest.approx(-1)
    apart = np.mean((x - y) ** 2)
    assert concordance(x, y) == pytest.approx(1 - apart / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))
    assert np.isnan(rank_correlation(np.ones(4), x[:4]))
    values = np.stack([x, y], axis=1)
    assert np.allclose(spread(values), np.abs(x - y) / np.sqrt(2) / values.mean(1).std())


def halves(n_tokens: int) -> Sections:
    """Every other stretch of 20 tokens is prose, the others are code."""
    parts = [(at, min(n_tokens, at + 20), ("prose", "code")[at // 20 % 2]) for at in range(0, n_tokens, 20)]
    return Sections.spread(parts, n_tokens)


def by_text(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each head has a drift of its own, whatever the text; how far queries lie from keys is drawn for each text."""
    own = np.random.default_rng(layer)
    rates, gaps = own.uniform(-0.05, 0.05, size=(1, HEADS[kind])), own.uniform(5, 60, size=(2, HEADS[kind]))
    vectors = rng.normal(size=(len(positions), HEADS[kind], DIM))
    vectors[:, :, 0] += rates * positions[:, None]
    vectors[:, :, 1] += gaps[positions // 20 % 2] * (1 if kind == "q" else 0)
    return vectors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stability") / "run"
    return planted_run(folder, by_text, sections=halves, layers=(0, 1, 2), lengths=(300, 200, 256, 280)).folder


def test_what_is_the_heads_own_is_stable_and_what_is_the_texts_is_not(folder: Path):
    study = Stability(analysis="position_geometry", resamples=20)
    (run,) = entry.opened(str(folder))
    found = study.measure(study.texts(run))
    table = found.tables["statistics"]
    value = {row["statistic"]: row for row in table.iter_rows(named=True)}
    assert value["alpha_k"]["agreement"] > 0.9 > 0.5 > value["mu_q_b"]["agreement"]
    assert value["alpha_k"]["heads"] == 3 * HEADS["q"] and value["alpha_k"]["halves"] > 0.9
    # Halves of one text keep what texts do not.
    assert value["mu_q_b"]["halves"] > 0.9
    assert (table["low"] <= table["high"]).all() and "Most stable is" in " ".join(found.findings)
    pairs = found.tables["pairs"].filter(statistic="alpha_k").row(0, named=True)
    heads = {name: study.texts(run)[name] for name in ("code", "prose")}
    tables = [entry.make("position_geometry", {"resamples": 0}).measure(one).tables["heads"] for one in heads.values()]
    x, y = (one["alpha_k"].to_numpy() for one in tables)
    assert (pairs["text"], pairs["other"]) == ("code", "prose")
    assert pairs["rank_correlation"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert pairs["difference"] == pytest.approx((y - x).mean())
    assert len(found.tables["spread"]) == 3 * HEADS["q"] and set(found.figures) == {"statistics", "spread"}


def test_runs_of_one_model_are_set_against_one_another(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in "ab":
        planted_run(tmp_path / "sweep" / name, by_text, layers=(0, 1, 2))
    asked = [f"runs={tmp_path / 'sweep'}", "analysis=key_rank", "resamples=0", "halves=false"]
    assert entry.main("stability", asked, act=steady) == 0
    out = tmp_path / "sweep" / "experiments" / "stability"
    table = pl.read_parquet(out / "statistics.parquet")
    assert {"rank", "effective_rank"} == set(table["statistic"]) and set(table["kind"]) == {"k"}
    assert table["halves"].is_null().all()
    # The same rows in both, so that nothing differs.
    assert (table["agreement"] - 1).abs().max() < 1e-9
    assert "no halves to hold this against" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give run=outputs/RUN, whose sections are compared, or runs="),
        (["run={bare}"], "has no sections: texts to set against one another are two sections"),
        (["run={run}", "sections=[code]"], "has code: texts to set against one another"),
        (["runs={both}", "sections=[code]"], "are of one run=RUN"),
        (["run={run}", "analysis=report"], "stability.analysis=report must name some of"),
        (["run={run}", "level=2"], "level within 0 and 1"),
    ],
)
def test_a_refusal_is_one_line(
    folder: Path, tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    bare = planted_run(tmp_path / "bare", layers=[0], lengths=[100]).folder
    asked = [word.format(run=folder, bare=bare, both=f"[{folder},{bare}]") for word in words]
    assert entry.main("stability", asked, act=steady) == 1
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said
