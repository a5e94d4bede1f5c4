"""Samples are those a run would have drawn, and their weighted totals are right on average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sniffer.experiments.common.rows import key_places, load
from sniffer.experiments.rope_frequencies import RopeFrequencies
from sniffer.experiments.sampling_error import SamplingError, enough_from, summarise
from sniffer.experiments.sampling_error.resample import Population, make_sampler
from sniffer.experiments.sampling_error.statistics import energy, statistics

from sniffer.errors import ConfigError, RunError
from sniffer.sampler import All, LogUniform, Picker
from tests.experiments.planted import HEADS, noise, planted_run, roped

EVERY = All(bucket_size=64)


def drifting(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Longer vectors at later positions, so that uneven sampling without weights is wrong."""
    return noise(layer, kind, positions, rng) * (1 + positions[:, None, None] / 100)


def test_a_sample_is_what_a_run_with_that_sampler_keeps(tmp_path: Path):
    sampler = LogUniform(base_rate=8.0, min_bucket_size=64)
    whole = planted_run(tmp_path / "all", sampler=EVERY)
    drawn = planted_run(tmp_path / "drawn", sampler=sampler)
    rows = load(whole, 1, "k")
    some = Population.of(rows).sample(rows, Picker(sampler, seed=7), "k", "positions")
    captured = load(drawn, 1, "k")
    # The buckets are the whole run's; which positions of which documents are kept is the sampler's affair.
    pairs = [sorted(zip(r.example_ids.tolist(), r.positions.tolist(), strict=True)) for r in (some, captured)]
    assert pairs[0] == pairs[1]
    assert sorted(some.weights) == sorted(captured.weights)
    for place in range(0, len(some), 7):
        at = (rows.example_ids == some.example_ids[place]) & (rows.positions == some.positions[place])
        assert np.array_equal(rows.vectors[:, at][:, 0], some.vectors[:, place])


@pytest.mark.parametrize("name", ["uniform", "log_uniform"])
def test_weighted_totals_are_right_on_average(tmp_path: Path, name: str):
    """Horvitz and Thompson: over many seeds the mean estimate is the truth, within four standard errors."""
    rows = load(planted_run(tmp_path / "run", drifting, sampler=EVERY, layers=[0]), 0, "k")
    everything = Population.of(rows)
    truth = energy(rows, len(everything))
    sampler = make_sampler(name, 8.0, 32)
    found = np.stack(
        [
            energy(everything.sample(rows, Picker(sampler, seed), "k", "positions"), len(everything))
            for seed in range(300)
        ]
    )
    error = found.std(0, ddof=1) / np.sqrt(300)
    assert (np.abs(found.mean(0) - truth) < 4 * error).all()


def test_without_weights_a_log_uniform_sample_is_wrong(tmp_path: Path):
    rows = load(planted_run(tmp_path / "run", drifting, sampler=EVERY, layers=[0]), 0, "k")
    everything = Population.of(rows)
    sampler = make_sampler("log_uniform", 8.0, 32)
    found = np.stack(
        [energy(everything.sample(rows, Picker(sampler, seed), "k", "rows"), len(everything)) for seed in range(100)]
    )
    assert (found.mean(0) < 0.8 * energy(rows, len(everything))).all()


def test_keeping_everything_has_no_error(tmp_path: Path):
    run = planted_run(tmp_path / "run", drifting, sampler=EVERY)
    errors = (
        SamplingError(base_rates=[64], bucket_size=64, repeats=2, samplers=["uniform"]).measure(run).tables["errors"]
    )
    assert errors["statistic"].n_unique() == 10
    assert np.allclose(errors["mean"], errors["truth"])
    assert errors["rmse"].max() < 1e-9


def test_more_rows_err_less(tmp_path: Path):
    run = planted_run(tmp_path / "run", drifting, sampler=EVERY, lengths=[512, 500, 400])
    tables = SamplingError(base_rates=[4, 32], bucket_size=64, repeats=6).measure(run).tables
    assert len(tables["errors"]) == 2 * HEADS["q"] * 10 * 3 * 2
    for name in ("key_energy", "r_k", "bias_strength", "quantisation"):
        some = tables["summary"].filter(statistic=name, sampler="uniform").sort("base_rate")
        assert some["rmse"][1] < some["rmse"][0], name


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_before_rope_adds_concentration_over_the_pairs_that_turn(tmp_path: Path, layout: str):
    run = planted_run(tmp_path / "run", roped(layout), sampler=EVERY, kinds=("q", "k", "q_pre"), layers=[0])
    errors = SamplingError(base_rates=[8], repeats=2).measure(run).tables["errors"]
    truth = errors.filter(statistic="concentration", sampler="uniform").sort("head")["truth"]
    measured = RopeFrequencies().measure(run).tables["heads"].filter(kind="q_pre").sort("head")["concentration"]
    assert np.allclose(truth, measured)


def test_without_rope_there_is_no_concentration(tmp_path: Path):
    def still(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return noise(layer, kind, positions, np.random.default_rng(ord(kind[0])))

    run = planted_run(tmp_path / "run", still, sampler=EVERY, kinds=("q", "k", "q_pre"), layers=[0])
    errors = SamplingError(base_rates=[8], repeats=2).measure(run).tables["errors"]
    assert "concentration" not in set(errors["statistic"])


def test_too_few_rows_leave_a_statistic_undefined_rather_than_wrong(tmp_path: Path):
    run = planted_run(tmp_path / "run", sampler=EVERY, layers=[0])
    queries, keys = load(run, 0, "q"), load(run, 0, "k")
    places = key_places(run, queries, keys)
    found = statistics(queries.take([0, 1]), keys.take([0, 1]), places, 756)
    assert np.isfinite(found.pop("key_energy")).all()
    assert all(np.isnan(values).all() for values in found.values())
    errors = SamplingError(base_rates=[0.05], repeats=2).measure(run).tables
    assert errors["summary"].filter(statistic="r_k")["relative_error"].is_null().all()


def test_enough_means_from_there_on():
    case = pl.DataFrame({"base_rate": [1.0, 4.0, 16.0, 64.0], "relative_error": [0.1, None, 0.2, 0.1]})
    assert enough_from(case, 0.25) == 16
    assert enough_from(case, 0.15) == 64
    assert enough_from(case, 0.01) == np.inf


def test_the_summary_is_a_median_over_heads():
    frame = {"sampler": "uniform", "weights": "positions", "base_rate": 1.0, "statistic": "x", "rows": 5.0, "mean": 0.0}
    values = pl.DataFrame({"truth": [0.0, 2, 4], "bias": [1.0, 2, 9], "spread": [1.0, 1, 1], "rmse": [1.0, 2, 9]})
    summary = summarise(values.with_columns(**{name: pl.lit(value) for name, value in frame.items()}))
    assert summary["rmse"].to_list() == [2] and summary["relative_error"].to_list() == [1]


def test_a_sampled_run_is_no_truth(tmp_path: Path):
    with pytest.raises(RunError, match="sampler=all"):
        SamplingError().measure(planted_run(tmp_path / "run"))


@pytest.mark.parametrize(
    "wrong", [{"samplers": ["x"]}, {"samplers": []}, {"base_rates": [0]}, {"repeats": 1}, {"bucket_size": 100}]
)
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, object]):
    with pytest.raises(ConfigError):
        SamplingError(**wrong)  # type: ignore[arg-type]


def test_one_head_is_too_few_to_tell_a_spread_between_heads(tmp_path: Path):
    def alone(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return noise(layer, kind, positions, rng)[:, :1]

    settings = {"base_rates": [4, 64], "bucket_size": 64, "repeats": 2, "samplers": ["uniform"]}
    run = planted_run(tmp_path / "run", alone, sampler=EVERY, layers=[0, 1], heads=dict.fromkeys(HEADS, 1))
    with pytest.raises(RunError, match="one query head here.*take more layers, or capture more heads"):
        SamplingError(layers=[0], **settings).measure(run)
    assert len(SamplingError(**settings).measure(run).tables["errors"])
