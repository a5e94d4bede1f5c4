"""Quantisation stays within half a step, and its error is the closed form where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sniffer.experiments.quantisation import Quantisation
from sniffer.experiments.quantisation.core import channel_size, outliers, quantised, relative_error

from sniffer.errors import ConfigError
from tests.experiments.planted import DIM, HEADS, noise, planted_run

X = np.random.default_rng(0).normal(size=(2, 50, 12)).astype(np.float32)
ONES = np.ones(50)


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [3, 8, 1000])
def test_no_number_moves_further_than_half_a_step(per: str, bits: int, group: int):
    moved = np.abs(quantised(X, bits, per, group) - X)
    axis = {"channel": 1, "token": 2}[per]
    for start in range(0, X.shape[axis], group):
        part = np.take(X, np.arange(start, min(start + group, X.shape[axis])), axis=axis)
        step = (part.max(axis, keepdims=True) - part.min(axis, keepdims=True)) / (2**bits - 1)
        far = np.take(moved, np.arange(start, min(start + group, X.shape[axis])), axis=axis)
        assert (far <= step / 2 + 1e-6).all()


def test_channels_are_the_tokens_of_the_transpose():
    there = quantised(X, 3, "channel", 5)
    assert np.allclose(there, quantised(X.swapaxes(1, 2), 3, "token", 5).swapaxes(1, 2))


def test_groups_of_few_levels_come_back_exactly():
    few = np.random.default_rng(0).integers(0, 4, size=(1, 40, 6)).astype(np.float32)
    few[:, :2] = [[[0] * 6, [3] * 6]]
    assert np.allclose(quantised(few, 2, "channel", 40), few)
    assert np.array_equal(quantised(np.full((1, 9, 4), 0.7), 2, "token", 3), np.full((1, 9, 4), 0.7))


def test_the_error_on_even_numbers_is_the_closed_form():
    """Evenly spread over [0, 1), a step s leaves s^2 / 12; the numbers' own mean square is 1 / 3."""
    x = np.random.default_rng(0).uniform(size=(1, 20_000, 4))
    error = relative_error(x, quantised(x, 4, "channel", 20_000), np.ones(20_000))
    assert error[0] == pytest.approx(np.sqrt((1 / 15) ** 2 / 12 * 3), rel=0.01)


def test_more_bits_lose_less():
    errors = [relative_error(X, quantised(X, bits, "channel", 50), ONES) for bits in (1, 2, 3, 4, 8)]
    assert (np.diff(errors, axis=0) < 0).all()


def test_a_large_channel_spoils_tokens_but_not_channels():
    x = X.copy()
    x[:, :, 5] += 100
    small = np.delete(np.arange(12), 5)

    def lost(per: str) -> np.ndarray:
        return relative_error(x[..., small], quantised(x, 4, per, 1000)[..., small], ONES)

    assert (lost("token") > 5 * lost("channel")).all()


def test_a_large_channel_is_an_outlier_and_the_only_one():
    x = X.copy()
    x[1, :, 5] *= 40
    size = channel_size(x, ONES)
    assert np.argwhere(outliers(size, 10.0)).tolist() == [[1, 5]]
    assert np.allclose(np.median(size, axis=1), 1)


def test_lengthening_all_keys_changes_no_relative_number():
    assert np.allclose(
        relative_error(X, quantised(X, 2, "token", 4), ONES),
        relative_error(9 * X, quantised(9 * X, 2, "token", 4), ONES),
    )
    assert np.allclose(channel_size(X, ONES), channel_size(9 * X, ONES))


def test_tables_have_every_case(tmp_path: Path):
    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return noise(layer, kind, positions, rng) + (20 * np.eye(DIM)[3] if kind == "k_pre" else 0)

    result = Quantisation(outlier=8.0).measure(planted_run(tmp_path / "run", formula, kinds=("q", "k", "k_pre")))
    assert len(result.tables["errors"]) == 2 * 2 * HEADS["k"] * 4 * 2
    found = result.tables["channels"].filter("outlier")
    assert set(found["kind"]) == {"k_pre"} and set(found["channel"]) == {3}
    heads = result.tables["heads"]
    assert (heads["channel_8bit"] < heads["channel_2bit"]).all()
    assert heads.filter(kind="k_pre")["outlier_channels"].to_list() == [1] * 2 * HEADS["k"]


@pytest.mark.filterwarnings("error")
def test_keys_that_do_not_vary_have_no_error_and_a_figure(tmp_path: Path):
    still = planted_run(tmp_path / "run", lambda *arguments: np.ones_like(noise(*arguments)))
    result = Quantisation().measure(still)
    assert (result.tables["errors"]["error"] == 0).all() and "errors" in result.figures


@pytest.mark.parametrize("wrong", [{"bits": []}, {"bits": [0]}, {"group": 1}, {"outlier": 0.5}])
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, object]):
    with pytest.raises(ConfigError):
        Quantisation(**wrong)  # type: ignore[arg-type]
