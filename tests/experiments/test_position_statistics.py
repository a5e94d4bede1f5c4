"""What position_geometry says beside the plane, each against numpy or scipy by its definition; and its intervals."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats
from sniffer.experiments.common.moments import moments, moments_of
from sniffer.experiments.common.resampling import GROUPS, Draws, draw_documents, percentiles, sums_by, unit_sums
from sniffer.experiments.common.results import Result
from sniffer.experiments.position_geometry import PositionGeometry
from sniffer.experiments.position_geometry.heads import mean_r2
from sniffer.experiments.position_geometry.line import by_pair, kurtosis_again, line, shape_of
from sniffer.experiments.position_geometry.pca import (
    LOW,
    components,
    leading,
    linear_share,
    linear_share_of_components,
    taxonomy,
)
from sniffer.experiments.position_geometry.plane import largest_separation, plane, separation_strength
from sniffer.experiments.position_geometry.rings import drawn_again, rings

from sniffer.errors import ConfigError
from sniffer.reader.run import Run
from sniffer.types import Rope
from tests.experiments.planted import HEADS, SPEEDS, noise, planted_run, rope, rows

N, DIM = 300, 8


@pytest.fixture
def sides() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions, weights, and queries and keys of two heads that drift along directions of their own."""
    rng = np.random.default_rng(5)
    t = np.sort(rng.choice(2048, size=N, replace=False))
    drift = rng.normal(size=(2, 1, DIM)) * (t / 700)[:, None]
    spread = rng.uniform(0.3, 2, size=DIM)
    q = rng.normal(size=(2, N, DIM)) * spread + drift + rng.normal(size=(2, 1, DIM))
    k = rng.normal(size=(2, N, DIM)) * spread[::-1] + 2 * drift - rng.normal(size=(2, 1, DIM))
    return t, rng.integers(1, 4, size=N).astype(float), q, k


def explained_by_a_line(x: np.ndarray, t: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By numpy's least squares, one dimension at a time: what a line leaves of each, and what there was."""
    left, there = [], []
    for column in x.T:
        fit = np.polyval(np.polyfit(t, column, 1, w=np.sqrt(weights)), t)
        left.append(weights @ (column - fit) ** 2)
        there.append(weights @ (column - np.average(column, weights=weights)) ** 2)
    return np.array(left), np.array(there)


def test_the_two_taxonomies_part_where_the_other_side_is_in_the_middle():
    r_q, r_k = np.array([0.9, 0.9, 0.1, 0.5, 0.8, 0.2, 0.5]), np.array([0.5, 0.2, 0.9, 0.8, -0.9, 0.1, 0.5])
    both = ["position-dominated", "content-focused", "mixed"]
    assert taxonomy(r_q, r_k) == ["q-positional", "q-positional", "k-positional", "k-positional", *both]
    assert taxonomy(r_q, r_k, LOW) == ["mixed", "q-positional", "k-positional", "mixed", *both]


def test_linear_shares_are_those_of_least_squares(sides):
    t, weights, q, k = sides
    of_q, of_k = moments(q, t, weights), moments(k, t, weights)
    pooled = plane(of_q, of_k).pooled
    for head in range(2):
        for found, x, at, w in (
            (linear_share(of_q), q[head], t, weights),
            (linear_share(of_k), k[head], t, weights),
            (linear_share(pooled), np.concatenate([q[head], k[head]]), np.tile(t, 2), np.tile(weights, 2)),
        ):
            left, there = explained_by_a_line(x, at, w)
            assert found[head] == pytest.approx(1 - left.sum() / there.sum())
        left, there = explained_by_a_line(q[head], t, weights)
        assert mean_r2(of_q)[head] == pytest.approx((1 - left / there).mean())


def test_the_share_of_components_is_the_sum_over_them(sides):
    """As the notes have it: variance explained by each, times Pearson's r of one kind along it, squared."""
    t, _, q, k = sides
    found = linear_share_of_components(components(moments(q, t, np.ones(N)), moments(k, t, np.ones(N))))
    for head in range(2):
        values, axes = np.linalg.eigh(np.cov(np.concatenate([q[head], k[head]]).T))
        for side, x in zip(found, (q[head], k[head]), strict=True):
            r = [np.corrcoef(x @ axis, t)[0, 1] for axis in axes.T]
            assert side[head] == pytest.approx((values / values.sum()) @ np.square(r))


def test_separation_is_that_of_every_query_from_every_key(sides):
    t, weights, q, k = sides
    of_q, of_k = moments(q, t, weights), moments(k, t, weights)
    model = plane(of_q, of_k)
    along, most = separation_strength(of_q, of_k, model.b), largest_separation(of_q, of_k, model.a)
    for head in range(2):
        apart = (q[head][:, None] - k[head][None]).reshape(-1, DIM)
        w = np.outer(weights, weights).ravel()
        assert along[head] == pytest.approx(w @ (apart @ model.b[head]) ** 2 / (w @ (apart**2).sum(1)))
        off = apart - np.outer(apart @ model.a[head], model.a[head])
        top = np.linalg.svd(off * np.sqrt(w)[:, None], full_matrices=False)[1][0] ** 2
        assert most[head] == pytest.approx(top / (w @ (apart**2).sum(1)))
    assert (along <= most).all()


def test_a_line_in_one_rotary_pair_has_all_of_the_weight():
    rng = np.random.default_rng(0)
    t = np.arange(4000)
    x = rng.normal(size=(1, len(t), DIM))
    x[0, :, 2] += t / 500
    x[0, :, 2 + DIM // 2] -= t / 500
    found = line(rows(x, t), moments(x, t, np.ones(len(t))))
    left, there = explained_by_a_line(x[0], t, np.ones(len(t)))
    assert np.allclose(found.r2[0], 1 - left / there, atol=1e-6)
    assert found.weight.sum() == pytest.approx(1)
    pairs = by_pair(found.weight, Rope(tuple(SPEEDS)).places(pre=False))
    assert pairs[0].argmax() == 2 and pairs[0, 2] > 0.99
    slope = np.array([np.polyfit(t, column, 1)[0] for column in x[0].T])
    assert found.drift_r2[0] == pytest.approx(np.corrcoef(x[0] @ slope, t)[0, 1] ** 2, abs=1e-6)


def test_shapes_are_scipys():
    rng = np.random.default_rng(1)
    x = np.stack([rng.normal(size=500), rng.exponential(size=500), rng.standard_t(3, size=500), np.ones(500)], axis=1)
    found = shape_of(x, np.ones(500))
    for column in range(3):
        z = (x[:, column] - x[:, column].mean()) / x[:, column].std()
        told = stats.kstest(z, "norm")
        assert found.skew[column] == pytest.approx(stats.skew(z))
        assert found.kurtosis[column] == pytest.approx(stats.kurtosis(z))
        assert found.distance[column] == pytest.approx(told.statistic)
        assert found.p[column] == pytest.approx(told.pvalue, rel=0.02, abs=1e-3)
    assert found.p[0] > 0.05 and found.p[1] < 1e-6
    assert (found.skew[3], found.kurtosis[3], found.distance[3], found.p[3]) == (0, 0, 0, 1)


def test_a_shape_of_weighted_rows_is_that_of_repeated_ones():
    rng = np.random.default_rng(2)
    x, repeats = rng.exponential(size=(200, 3)), rng.integers(1, 4, size=200)
    weighted, repeated = (
        shape_of(x, repeats.astype(float)),
        shape_of(np.repeat(x, repeats, axis=0), np.ones(repeats.sum())),
    )
    for name in ("skew", "kurtosis", "distance"):
        assert np.allclose(getattr(weighted, name), getattr(repeated, name))


def test_an_orthogonal_map_changes_none_of_it(sides):
    t, weights, q, k = sides
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(DIM, DIM)))[0]

    def told(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        of_q, of_k = moments(q, t, weights), moments(k, t, weights)
        model, fitted = plane(of_q, of_k), line(rows(q, t, weights=weights), of_q)
        shares = linear_share_of_components(components(of_q, of_k))
        return np.stack(
            [
                linear_share(of_q),
                *shares,
                separation_strength(of_q, of_k, model.b),
                largest_separation(of_q, of_k, model.a),
                fitted.drift_r2,
                fitted.shape.kurtosis[:, 0],
                fitted.shape.skew[:, 0],
            ]
        )

    # `rows` has float32.
    assert np.allclose(told(q, k), told(q @ turn, k @ turn), atol=1e-4)


def test_a_draw_is_the_rows_of_its_documents_as_often_as_they_were_drawn(sides):
    t, weights, q, k = sides
    unit = np.arange(N) % 3
    counts = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
    own = {kind: rows(x, t, weights=weights) for kind, x in (("q", q), ("k", k))}
    whole = {kind: moments_of(one) for kind, one in own.items()}
    sums = {kind: unit_sums(own[kind], unit, 3, whole[kind]) for kind in own}
    start = components(whole["q"], whole["k"]).axes[:, :, :6]
    of_draws = zip(sums["q"].of_draws(counts), sums["k"].of_draws(counts), strict=True)
    for count, (drawn_q, drawn_k) in zip(counts.astype(int), of_draws, strict=True):
        again = {kind: one.take(np.repeat(np.arange(N), count[unit])) for kind, one in own.items()}
        true_q, true_k = moments_of(again["q"]), moments_of(again["k"])
        for name in ("weight", "mean", "covariance", "mean_t", "variance_t", "covariance_t"):
            assert np.allclose(getattr(drawn_q, name), getattr(true_q, name)), name
        guess, exact = leading(drawn_q, drawn_k, start), components(true_q, true_k)
        assert np.allclose(guess.explained[:, 0], exact.explained[:, 0], rtol=1e-4)
        assert np.allclose(guess.r_q[:, 0], exact.r_q[:, 0], atol=1e-2)
        assert np.allclose(plane(drawn_q, drawn_k).bias_strength, plane(true_q, true_k).bias_strength)


def test_turns_and_kurtosis_of_a_draw_are_those_of_its_rows():
    rng = np.random.default_rng(3)
    t, unit = rng.integers(0, 1024, size=N), np.arange(N) % 3
    weights = rng.uniform(0.5, 2, size=N)
    x = rope(0.4 * rng.normal(size=(2, N, DIM)) + np.eye(DIM)[1], t, "half")
    found = rings(np.broadcast_to(np.eye(DIM), (2, DIM, DIM)), x, t, weights)
    counts = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]])
    share, explained = drawn_again(found, x, t, weights, unit, counts)
    assert np.allclose(share[0], found.share) and np.allclose(explained[0], found.explained, rtol=1e-5)
    w = weights * counts[1][unit]
    w /= w.sum()
    for head in range(2):
        scores = x[head] @ found.axes[head]
        scores -= w @ scores
        for pair in range(DIM // 2):
            z = scores[:, 2 * pair] + 1j * scores[:, 2 * pair + 1]
            assert share[1, head, pair] == pytest.approx(w @ np.abs(z) ** 2 / (w @ (scores**2).sum(1)))
            peak = abs(w @ (z * np.exp(-1j * found.speed[head, pair] * t))) ** 2
            assert explained[1, head, pair] == pytest.approx(peak / (w @ np.abs(z) ** 2))
    e = rng.exponential(size=(2, N))
    again = kurtosis_again(e, np.ones(N), unit, counts)
    for place, count in enumerate(counts.astype(int)):
        assert np.allclose(again[place], stats.kurtosis(np.repeat(e, count[unit], axis=1), axis=1))


def test_intervals_cover_the_truth_where_rows_of_a_document_are_alike():
    """Means of 24 documents of 30 rows, each with a shift of its own: nine in ten intervals of rows would miss it."""
    rng = np.random.default_rng(4)
    unit, counts = np.repeat(np.arange(24), 30), rng.multinomial(24, np.full(24, 1 / 24), size=200).astype(float)
    held = 0
    for _ in range(100):
        x = rng.normal(size=24)[unit] + 0.1 * rng.normal(size=len(unit))
        sums = sums_by(24, unit, np.stack([x, np.ones(len(unit))], axis=1)[None])
        drawn = np.tensordot(counts, sums, axes=1)[:, 0]
        low, high = percentiles(drawn[:, :1] / drawn[:, 1:], 0.9)
        held += low[0] < 0 < high[0]
    assert 78 <= held <= 97


def drifting(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    vectors = noise(layer, kind, positions, rng)
    vectors[:, :, 0] += 3 + 0.02 * positions[:, None]
    return vectors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("statistics") / "run"
    return planted_run(folder, drifting, turns=Rope(tuple(SPEEDS)), lengths=(300, 200, 256, 280, 150))


@pytest.fixture(scope="module")
def result(run: Run) -> Result:
    return PositionGeometry(resamples=40).measure(run)


def test_every_number_of_a_sentence_has_an_interval(result: Result):
    """In the last sentence, what the brackets are; numbers that are names stay without."""
    *says, told = result.findings
    assert "40 draws of the 5 documents" in told
    for sentence in says:
        bare = re.sub(
            r"\[[^]]*\]", "*", re.sub(r"layer \d+|head \d+|of \d+ heads|r \w+ squared|below 0\.3|1000", "", sentence)
        )
        numbers = re.findall(r"[+-]?\d[\d.]*%?( \*)?", bare.replace("0: Gaussian", ""))
        assert numbers and all(numbers), sentence
    summary = result.tables["summary"]
    assert summary["low"].is_not_null().all() and (summary["low"] <= summary["high"]).all()
    heads = result.tables["heads"]
    value = dict(summary.select("statistic", "value").iter_rows())
    assert value["positive_bias"] == (heads["bias_strength"] > 0).sum()
    assert value["linear_share_k"] == heads["linear_share_k"].median()
    assert sum(count for name, count in value.items() if name.startswith("taxonomy ")) == len(heads)


def test_the_planted_drift_lies_within_its_interval(result: Result):
    slopes = result.tables["intervals"].filter(pl.col("statistic") == "alpha_k")
    assert len(slopes) == 2 * HEADS["q"]
    inside = (slopes["low"] < 0.02) & (slopes["high"] > 0.02)
    assert inside.mean() >= 0.5 and (slopes["high"] - slopes["low"]).max() < 0.01
    assert (slopes["value"] - result.tables["heads"]["alpha_k"]).abs().max() == 0


def test_rope_is_told_of_each_layer(run: Run, result: Result):
    assert result.tables["heads"]["rope"].all() and not any("RoPE turns nothing" in one for one in result.findings)
    pairs = result.tables["rotary_planes"]
    assert pairs["inv_freq"].unique(maintain_order=True).to_list() == list(SPEEDS)
    sums = pairs.group_by("layer", "head", "kind").agg(pl.col("weight").sum())
    assert np.allclose(sums["weight"], 1)  # Every dimension of these heads turns.
    (told,) = run.manifest.rope
    some = [{**told, "layers": [0]}, {**told, "layers": [1], "inv_freq": []}]
    mixed = Run(run.folder, replace(run.manifest, rope=tuple(some)))
    found = PositionGeometry(resamples=0).measure(mixed)
    assert found.tables["heads"].group_by("rope", maintain_order=True).agg("layer").rows() == [
        (True, [0] * HEADS["q"]),
        (False, [1] * HEADS["q"]),
    ]
    assert "RoPE turns nothing in layers 1." in found.findings
    assert found.tables["rotary_planes"]["layer"].unique().to_list() == [0]
    assert found.tables["dimensions"].filter(layer=1)["pair"].is_null().all()


def test_one_document_has_no_intervals_and_says_so(tmp_path: Path):
    found = PositionGeometry().measure(planted_run(tmp_path / "run", lengths=(300,), layers=[0]))
    assert "no intervals" in found.findings[-1] and "[" not in "".join(found.findings)
    assert found.tables["intervals"]["low"].is_null().all() and found.tables["heads"]["rope"].is_null().all()


def test_windows_of_a_text_are_drawn_together_and_many_documents_in_groups(run: Run):
    class Windows(Run):
        def examples(self) -> pl.DataFrame:
            return pl.DataFrame({"example_id": range(200), "source": [number // 2 for number in range(200)]})

    found = draw_documents(Windows(run.folder, run.manifest), 50, 0)
    assert isinstance(found, Draws)
    assert found.documents == 100 and found.units == GROUPS and found.counts.shape == (50, GROUPS)
    assert all(found.unit_of[2 * text] == found.unit_of[2 * text + 1] for text in range(100))
    assert set(np.bincount(list(found.unit_of.values()))) == {6, 8}
    assert (found.counts.sum(1) == GROUPS).all()


@pytest.mark.parametrize("setting", [{"resamples": -1}, {"level": 1.0}])
def test_settings_that_make_no_sense_are_refused(setting: dict):
    with pytest.raises(ConfigError, match="wants resamples 0 or more and level within 0 and 1"):
        PositionGeometry(**setting)
