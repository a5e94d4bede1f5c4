"""Rank counts the dimensions that were planted, and does not depend on how the space is turned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sniffer.experiments.common.moments import moments_of
from sniffer.experiments.key_rank import KeyRank, effective_rank, rank_at, side_by_side, spectrum

from sniffer.errors import ConfigError
from tests.experiments.planted import DIM, HEADS, noise, planted_run, rows


@pytest.mark.parametrize("planted", [1, 3, 8])
def test_keys_in_a_subspace_have_its_rank(planted: int):
    rng = np.random.default_rng(planted)
    x = rng.normal(size=(2, 500, planted)) @ rng.normal(size=(2, planted, DIM)) + 7
    values = spectrum(moments_of(rows(x, np.arange(500))))
    assert (rank_at(values, 0.999999) <= planted).all()
    assert (effective_rank(values) <= planted + 1e-3).all()


def test_equal_variances_are_counted_one_by_one():
    values = np.ones((1, 10))
    assert [int(rank_at(values, share)[0]) for share in (0.05, 0.1, 0.5, 0.9, 0.91)] == [1, 1, 5, 9, 10]
    assert effective_rank(values)[0] == pytest.approx(10)


def test_what_does_not_vary_has_rank_nought():
    assert rank_at(np.zeros((1, 4)), 0.9).tolist() == [0]


def test_turning_the_space_changes_no_eigenvalue():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 200, DIM)) * np.arange(1, DIM + 1)
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    t = np.arange(200)
    assert np.allclose(spectrum(moments_of(rows(x, t))), spectrum(moments_of(rows(x @ turn, t))), rtol=1e-4)


def test_side_by_side_keeps_all_variance():
    x = np.random.default_rng(0).normal(size=(3, 200, DIM))
    side = rows(x, np.arange(200))
    alone, joint = spectrum(moments_of(side)), spectrum(moments_of(side_by_side(side)))
    assert joint.shape == (1, 3 * DIM)
    assert joint.sum() == pytest.approx(alone.sum())


def test_tables_tell_kinds_and_heads_apart(tmp_path: Path):
    """Before RoPE keys lie on a line, after it they fill the space."""

    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        vectors = noise(layer, kind, positions, rng)
        return vectors * np.eye(DIM)[0] if kind == "k_pre" else vectors

    run = planted_run(tmp_path / "run", formula, kinds=("q", "k", "k_pre"))
    result = KeyRank().measure(run)
    heads = result.tables["heads"]
    assert len(heads) == 2 * 2 * HEADS["k"]
    assert set(heads.filter(kind="k_pre")["rank"]) == {1}
    assert heads.filter(kind="k")["rank"].min() >= DIM - 2
    assert result.tables["layers"].filter(kind="k_pre")["rank"].to_list() == [HEADS["k"]] * 2
    assert any("raises the rank in 4 of 4" in sentence for sentence in result.findings)


def test_without_pre_the_findings_say_what_is_missing(tmp_path: Path):
    result = KeyRank().measure(planted_run(tmp_path / "run"))
    assert any("add k_pre" in sentence for sentence in result.findings)


@pytest.mark.parametrize("variance", [0, 1, 1.5])
def test_a_share_must_lie_between_nought_and_one(variance: float):
    with pytest.raises(ConfigError):
        KeyRank(variance=variance)
