"""RoPE that was planted is measured again: its pairs, its speeds, and what each pair is used for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sniffer.experiments.common.turns import best_turn, sharpened
from sniffer.experiments.rope_frequencies import RopeFrequencies
from sniffer.experiments.rope_frequencies.core import concentration, find_layout, norms, rotary_pairs

from sniffer.errors import ConfigError, RunError
from tests.experiments.planted import DIM, SPEEDS, planted_run, rope, roped, rows


def both(layout: str, rotary: int = DIM):
    rng = np.random.default_rng(0)
    t = np.sort(rng.integers(0, 3000, size=300))
    x = rng.normal(size=(4, 300, DIM))
    return rows(x, t, kind="q_pre"), rows(rope(x, t, layout, rotary), t)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary", [4, 8])
def test_the_layout_is_seen_from_the_vectors(layout: str, rotary: int):
    assert find_layout(*both(layout, rotary)) == (layout, rotary)


def test_a_constant_factor_after_rope_does_not_hide_the_layout():
    before, after = both("interleaved")
    assert find_layout(before, rows(1.3 * after.vectors, after.positions)) == ("interleaved", DIM)


def test_what_is_no_rope_is_refused():
    before, after = both("half")
    with pytest.raises(RunError, match="changes nothing"):
        find_layout(before, before)
    with pytest.raises(RunError, match="neither layout"):
        find_layout(before, rows(np.random.default_rng(1).normal(size=(4, 300, DIM)), after.positions))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_keeps_norms_and_undoes_concentration(layout: str):
    before, after = both(layout)
    x = before.vectors + 3
    fixed = rows(rope(x.astype(float), before.positions, layout), before.positions)
    one, other = (rotary_pairs(v, layout, DIM) for v in (x, fixed.vectors))
    assert np.allclose(norms(one, before.weights)[0], norms(other, before.weights)[0], rtol=1e-5)
    assert (concentration(one, before.weights) > 0.8).all()
    # A pair that turns many times over the document points everywhere.
    assert (concentration(other, before.weights)[:, :2] < 0.3).all()
    assert len(after) == len(before)


def test_concentration_is_one_for_one_direction_and_small_for_all():
    z = np.exp(1j * np.linspace(0, 2 * np.pi, 100, endpoint=False))[None, :, None]
    ones = np.ones(100)
    assert concentration(np.full((1, 100, 1), 2 + 1j), ones)[0, 0] == pytest.approx(1)
    assert concentration(z, ones)[0, 0] == pytest.approx(0, abs=1e-12)
    # Half of the circle: the mean of cos over it is 2 / pi.
    half = np.exp(1j * np.linspace(-np.pi / 2, np.pi / 2, 20_001))[None, :, None]
    assert concentration(half, np.ones(20_001))[0, 0] == pytest.approx(2 / np.pi, rel=1e-3)


@pytest.mark.parametrize("speed", [2.5, 0.07, 1.4e-5, -0.3])
def test_speeds_are_sharp_even_where_a_turn_takes_far_longer_than_the_document(speed: float):
    t = np.sort(np.random.default_rng(0).integers(0, 2048, size=500))
    z = np.exp(1j * (speed * t + 0.3))[None, :, None]
    share = np.full(500, 1 / 500)
    explained, coarse = best_turn(z, t, share)
    assert explained[0, 0] > 0.94
    assert sharpened(z, t, share, coarse)[0, 0] == pytest.approx(speed, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_the_tables_find_pair_and_speed(tmp_path: Path, layout: str):
    run = planted_run(tmp_path / "run", roped(layout), kinds=("q", "q_pre", "k_pre"))
    tables = RopeFrequencies().measure(run).tables
    assert set(tables["heads"]["strongest_pair"]) == {2} == set(tables["heads"]["most_fixed_pair"])
    measured = tables["pairs"].filter(layer=0, head=0, kind="q_pre").sort("pair")["speed"]
    assert np.allclose(measured, SPEEDS, rtol=1e-3)
    shares = tables["pairs"].group_by("layer", "head", "kind").agg(pl.col("energy_share").sum())
    assert len(shares) == len(tables["heads"]) and np.allclose(shares["energy_share"], 1)


def test_without_q_the_layout_is_assumed_and_said_to_be(tmp_path: Path):
    run = planted_run(tmp_path / "run", roped("half"), kinds=("q_pre",))
    result = RopeFrequencies().measure(run)
    assert result.tables["pairs"]["speed"].null_count() == len(result.tables["pairs"])
    assert any("assumed" in sentence for sentence in result.findings)
    with pytest.raises(RunError, match="more than the 8 dimensions"):
        RopeFrequencies(rotary=64).measure(run)


@pytest.mark.parametrize("wrong", [{"layout": "spiral"}, {"rotary": 3}, {"rotary": 0}])
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, object]):
    with pytest.raises(ConfigError):
        RopeFrequencies(**wrong)  # type: ignore[arg-type]
