"""Distances are those of the formula, and an index finds all where it looks everywhere."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from sniffer.experiments.common.moments import Moments, moments
from sniffer.experiments.query_key_gap import QueryKeyGap
from sniffer.experiments.query_key_gap.core import distance, recalls

from sniffer.errors import ConfigError, RunError
from tests.experiments.planted import DIM, HEADS, noise, planted_run

RNG = np.random.default_rng(0)


def law(x: np.ndarray) -> Moments:
    return moments(x, np.arange(x.shape[1]), np.ones(x.shape[1]))


def test_distance_is_the_textbooks():
    keys, x = RNG.normal(size=(2, 400, DIM)) * np.arange(1, DIM + 1), RNG.normal(size=(2, 30, DIM)) + 1
    found = distance(law(x), law(keys), shrinkage=1e-9)
    for head in range(2):
        centred = x[head] - keys[head].mean(0)
        inverse = np.linalg.inv(np.cov(keys[head].T, ddof=0))
        assert found[head] ** 2 * DIM == pytest.approx(np.einsum("nd,de,ne->n", centred, inverse, centred).mean())


def test_keys_lie_at_distance_one_and_a_shift_adds_what_it_should():
    keys = RNG.normal(size=(1, 50_000, DIM))
    near, far = (distance(law(x), law(keys), 1e-6)[0] for x in (keys, keys + 3))
    assert near == pytest.approx(1, rel=1e-3)
    # Each of dim coordinates adds 9 to a mean square of 1.
    assert far == pytest.approx(np.sqrt(10), rel=0.01)


def test_any_invertible_map_of_queries_and_keys_changes_nothing():
    keys, x = RNG.normal(size=(1, 300, DIM)), RNG.normal(size=(1, 40, DIM)) + 1
    change = RNG.normal(size=(DIM, DIM))
    here, there = distance(law(x), law(keys), 1e-12), distance(law(x @ change), law(keys @ change), 1e-12)
    assert np.allclose(here, there, rtol=1e-5)


def test_keys_that_do_not_vary_are_refused():
    with pytest.raises(RunError, match="do not vary"):
        distance(law(np.ones((1, 9, 2))), law(np.ones((1, 9, 2))), 0.1)


def test_looking_everywhere_finds_everything_and_looking_further_finds_more():
    keys = RNG.normal(size=(400, DIM)).astype(np.float32)
    searches = [RNG.normal(size=(60, DIM)).astype(np.float32), keys[:60]]
    found = recalls(keys, searches, top=5, cells=20, probes=[1, 5, 20], seed=0)
    assert np.allclose(found[:, 2], 1)
    assert (np.diff(found, axis=1) >= 0).all() and (found[:, 0] < 1).all()


def test_queries_from_elsewhere_are_far_and_keys_are_not(tmp_path: Path):
    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return noise(layer, kind, positions, rng) + (10 if kind == "q" and layer == 1 else 0)

    result = QueryKeyGap(searches=40, top=3).measure(planted_run(tmp_path / "run", formula))
    heads, recall = result.tables["heads"], result.tables["recall"]
    assert heads.filter(layer=0)["gap"].is_between(0.8, 1.2).all()
    assert (heads.filter(layer=1)["gap"] > 8).all()
    assert heads["distance_k"].is_between(0.8, 1.3).all()
    assert len(recall) == 2 * HEADS["q"] * 5
    assert recall["recall_q"].is_between(0, 1).all()


def test_recall_can_be_left_out_and_is_missed_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = planted_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert set(QueryKeyGap(recall=False).measure(run).tables) == {"heads"}
    with pytest.raises(RunError, match="pip install"):
        QueryKeyGap().measure(run)
    with pytest.raises(RunError, match="wants more"):
        QueryKeyGap(top=10_000).measure(run)


@pytest.mark.parametrize("wrong", [{"shrinkage": 0.0}, {"probes": [0.0]}, {"probes": []}, {"top": 0}, {"cells": 0}])
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, object]):
    with pytest.raises(ConfigError):
        QueryKeyGap(**wrong)  # type: ignore[arg-type]
