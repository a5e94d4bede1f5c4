"""Agreement of query heads is a correlation of scores, the intraclass correlation that of an analysis of variance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats
from sniffer.experiments.common import entry
from sniffer.experiments.common.results import Result
from sniffer.experiments.query_groups import QueryGroups
from sniffer.experiments.query_groups.core import Groups, agreement, intraclass, key_covariance, shuffled

from sniffer.errors import RunError
from tests.experiments.planted import DIM, HEADS, noise, planted_run, rows

PLACES = np.array([0, 0, 1])


@pytest.fixture
def sides() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Three query heads, two key heads that drift, positions and weights of the keys."""
    rng = np.random.default_rng(0)
    t = np.sort(rng.choice(1024, size=90, replace=False))
    k = rng.normal(size=(2, 90, DIM)) + np.array([[[0.004]], [[-0.002]]]) * t[:, None]
    k[1] += 0.7 * k[0]
    return rng.normal(size=(3, 40, DIM)), k, t, rng.integers(1, 4, size=90).astype(float)


@pytest.mark.parametrize("beyond", [False, True])
def test_agreement_is_the_correlation_of_scores_over_tokens(sides, beyond: bool):
    q, k, t, w = sides
    found = agreement(q, PLACES, key_covariance(rows(k, t, weights=w, kind="k"), beyond_position=beyond))
    if beyond:
        lines = [[np.polyval(np.polyfit(t, column, 1, w=np.sqrt(w)), t) for column in head.T] for head in k]
        k = k - np.array(lines).swapaxes(1, 2)
    for pair, (i, j) in enumerate(zip(*np.triu_indices(3, 1), strict=True)):
        for query in range(q.shape[1]):
            scores = [k[PLACES[head]] @ q[head, query] for head in (i, j)]
            table = np.cov(np.stack(scores), aweights=w)
            assert found[pair, query] == pytest.approx(table[0, 1] / np.sqrt(table[0, 0] * table[1, 1]), abs=1e-5)


def test_turning_a_key_head_and_its_queries_changes_nothing(sides):
    q, k, t, w = sides
    turns = np.linalg.qr(np.random.default_rng(3).normal(size=(2, DIM, DIM)))[0]
    plain, turned = (
        agreement(queries, PLACES, key_covariance(rows(keys, t, weights=w, kind="k"), beyond_position=False))
        for queries, keys in ((q, k), (q @ turns[PLACES], k @ turns))
    )
    assert np.allclose(plain, turned, atol=1e-5)


def nested(values: np.ndarray, of: Groups) -> float:
    """Mean squares of groups within layers, written out; groups of one size."""
    layers = np.unique(of.layer)
    within = between = 0.0
    free_within = free_between = 0
    for layer in layers:
        mine = [values[of.group == group] for group in np.unique(of.group[of.layer == layer])]
        mean_square = np.var([one.mean() for one in mine], ddof=1) * len(mine[0])
        between, free_between = between + mean_square * (len(mine) - 1), free_between + len(mine) - 1
        within = within + sum(((one - one.mean()) ** 2).sum() for one in mine)
        free_within += sum(len(one) - 1 for one in mine)
    b, w = between / free_between, within / free_within
    return float((b - w) / (b + (len(mine[0]) - 1) * w))


def planned(layers: int, groups: int, heads: int) -> Groups:
    group = np.repeat(np.arange(layers * groups), heads)
    return Groups(group // groups, group)


def test_intraclass_correlation_is_that_of_mean_squares():
    of, rng = planned(5, 3, 4), np.random.default_rng(1)
    values = rng.normal(size=60) + rng.normal(size=15)[of.group] + 10 * of.layer
    assert intraclass(values[None], of)[0] == pytest.approx(nested(values, of))
    one = planned(1, 6, 4)
    f = stats.f_oneway(*values[:24].reshape(6, 4)).statistic
    assert intraclass(values[None, :24], one)[0] == pytest.approx((f - 1) / (f + 3))
    # A draw of layers is these layers, one after the other.
    picked = [0, 0, 3, 4, 4]
    again = np.concatenate([values[of.layer == layer] for layer in picked])
    times = np.bincount(picked, minlength=5).astype(float)
    assert intraclass(values[None], of, times[None])[0] == pytest.approx(nested(again, of))


def test_intraclass_correlation_finds_what_was_planted():
    of, rng = planned(400, 3, 3), np.random.default_rng(2)
    spread = rng.normal(size=(2, len(of.group)))
    values = np.stack([0.0 * spread[0] + of.group, 0.5 * spread[0] + rng.normal(size=1200)[of.group], spread[1]])
    found = intraclass(values, of)
    assert found[0] == pytest.approx(1) and found[1] == pytest.approx(1 / 1.25, abs=0.03)
    assert abs(found[2]) < 0.06 and np.isnan(intraclass(np.ones((1, 3600)), of))[0]
    dealt = shuffled(values[1], of, 20, rng)
    assert np.abs(intraclass(dealt, of)).max() < 0.1
    assert np.allclose(np.sort(dealt[3].reshape(400, 9)), np.sort(values[1].reshape(400, 9)))


def twins(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The first two query heads, which share keys, look for nearly the same; the others for anything."""
    vectors = noise(layer, kind, positions, rng)
    if kind == "q":
        vectors[:, 1] = vectors[:, 0] + 0.1 * vectors[:, 1]
    return vectors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups") / "run"
    planted_run(folder, twins)
    assert entry.main("position_geometry", [f"run={folder}", "resamples=0"]) == 0
    return folder


def measured(folder: Path, **settings) -> Result:
    (run,) = entry.opened(str(folder))
    return QueryGroups(resamples=20, shuffles=50, **settings).measure(run)


def test_twins_are_found(folder: Path):
    found = measured(folder)
    pairs = found.tables["pairs"]
    assert len(pairs) == 2 * HEADS["q"] * (HEADS["q"] - 1) // 2
    assert pairs.filter(head=0, other=1)["agreement"].min() > 0.95
    assert pairs.filter(~pl.col("same_group"))["agreement"].abs().max() < 0.2
    heads = found.tables["heads"]
    assert heads.filter(head=0)["within_agreement"].min() > 0.95 > heads.filter(head=2)["within_agreement"].max()
    summary = found.tables["summary"]
    inside = summary.filter(what="agreement", heads="within").row(0, named=True)
    assert inside["value"] == pytest.approx(pairs.filter("same_group")["agreement"].mean())
    assert inside["low"] <= inside["value"] <= inside["high"]
    statistics = found.tables["statistics"]
    assert {"r_q", "bias_strength"} <= set(statistics["statistic"]) and statistics["p"].is_between(0, 1).all()
    # That of keys alone is one number for all heads of a group.
    assert "linear_share_k" not in set(statistics["statistic"]) and "residual_r" not in set(statistics["statistic"])


def test_statistics_of_other_rows_are_not_compared(folder: Path, tmp_path: Path):
    told = folder / "experiments" / "position_geometry" / "provenance.json"
    kept = told.read_text()
    told.write_text(json.dumps({**json.loads(kept), "run_digest": "another"}))
    found = measured(folder)
    told.write_text(kept)
    assert not len(found.tables["statistics"]) and "left no statistics of these rows" in " ".join(found.findings)


def test_heads_with_keys_of_their_own_are_refused(tmp_path: Path):
    run = planted_run(tmp_path / "run", noise_of_two, heads={"q": 2, "k": 2}, layers=[0])
    with pytest.raises(RunError, match="no two captured query heads share a key head"):
        QueryGroups().measure(run)


def noise_of_two(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(len(positions), 2, DIM))
