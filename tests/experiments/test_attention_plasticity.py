"""Plasticity is what a simulation of the same Gaussian queries gives, and pairs are those that were meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sniffer.experiments.attention_plasticity import AttentionPlasticity
from sniffer.experiments.attention_plasticity.core import measure, model_queries, plasticity, preference, reflection
from sniffer.experiments.attention_plasticity.pairs import draw_pairs

from sniffer.errors import ConfigError, RunError
from tests.experiments.planted import HEADS, noise, planted_run, rows

HEAD_COUNT, DIM = 3, 6


def gaussians(seed: int = 0):
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(HEAD_COUNT, DIM, DIM))
    return rng.normal(size=(HEAD_COUNT, DIM)), half @ half.swapaxes(1, 2) / DIM, rng


def test_preference_is_what_a_simulation_counts():
    mean, covariance, rng = gaussians()
    differences = rng.normal(size=(HEAD_COUNT, 5, DIM))
    p = preference(mean, covariance, differences)
    for head in range(HEAD_COUNT):
        drawn = rng.multivariate_normal(mean[head], covariance[head], size=40_000)
        counted = (drawn @ differences[head].T > 0).mean(0)
        assert np.abs(p[head] - counted).max() < 5 * 0.5 / np.sqrt(40_000)


def test_queries_simulated_with_drift_give_the_simulated_plasticity():
    """The whole way: fit drift and covariance to drawn queries, compare with counting over the true law."""
    mean, covariance, rng = gaussians(1)
    slope = rng.normal(size=(HEAD_COUNT, DIM)) / 1000
    t = np.sort(rng.integers(0, 2048, size=20_000))
    drawn = np.stack(
        [
            rng.multivariate_normal(m, c, size=len(t)) + s * t[:, None]
            for m, c, s in zip(mean, covariance, slope, strict=True)
        ]
    )
    model = model_queries(rows(drawn, t, bucket_size=256))
    differences = rng.normal(size=(HEAD_COUNT, 8, DIM))
    for place, bucket in enumerate(model.buckets):
        found = plasticity(preference(model.mean[:, place], model.covariance[:, place], differences))
        true = preference(mean + slope * (bucket * 256 + 127.5), covariance, differences)
        assert np.abs(found - plasticity(true)).max() < 0.1


def test_without_variance_the_sign_of_the_mean_decides():
    differences = np.array([[[1.0, 0], [-1, 0], [0, 1]]])
    p = preference(np.array([[2.0, 0]]), np.zeros((1, 2, 2)), differences)
    assert p.tolist() == [[1, 0, 0.5]]


def test_naming_the_keys_the_other_way_round_changes_nothing():
    mean, covariance, rng = gaussians()
    differences = rng.normal(size=(HEAD_COUNT, 20, DIM))
    there, back = preference(mean, covariance, differences), preference(mean, covariance, -differences)
    assert np.allclose(there + back, 1)
    assert np.allclose(plasticity(there), plasticity(back))
    assert ((plasticity(there) >= 0) & (plasticity(there) <= 1)).all()


def test_lengthening_queries_or_keys_changes_nothing():
    mean, covariance, rng = gaussians()
    differences = rng.normal(size=(HEAD_COUNT, 20, DIM))
    assert np.allclose(
        preference(mean, covariance, differences), preference(3 * mean, 9 * covariance, 0.2 * differences)
    )


def test_queries_without_a_mean_are_fully_plastic_and_certain_ones_rigid():
    _, covariance, rng = gaussians()
    differences = rng.normal(size=(HEAD_COUNT, 50, DIM))
    assert np.allclose(plasticity(preference(np.zeros((HEAD_COUNT, DIM)), covariance, differences)), 1)
    far = 1e6 * rng.normal(size=(HEAD_COUNT, DIM))
    assert plasticity(preference(far, covariance, differences)).mean() < 0.01


def test_the_diagonal_is_that_of_the_basis_that_begins_with_the_drift():
    mean, covariance, rng = gaussians(2)
    t = np.sort(rng.integers(0, 512, size=4000))
    drawn = np.stack([rng.multivariate_normal(m, c, size=len(t)) for m, c in zip(mean, covariance, strict=True)])
    drawn += 0.01 * t[:, None] * mean[:, None]
    full, diagonal = (model_queries(rows(drawn, t, bucket_size=512), which) for which in ("full", "diagonal"))
    slope = np.array([[np.polyfit(t, head[:, d], 1)[0] for d in range(DIM)] for head in drawn])
    turn = reflection(slope)
    there = turn @ diagonal.covariance[:, 0] @ turn
    assert np.allclose(there, there * np.eye(DIM), atol=1e-5)
    before = turn @ full.covariance[:, 0] @ turn
    assert np.allclose(np.diagonal(there, axis1=1, axis2=2), np.diagonal(before, axis1=1, axis2=2), atol=1e-4)


def test_a_reflection_is_orthogonal_and_takes_its_direction_to_the_first_axis():
    directions = np.array([[3.0, 4, 0], [-1, 0, 0], [0, 0, 0], [0, 0, -2]])
    turn = reflection(directions)
    assert np.allclose(turn @ turn, np.eye(3))
    assert np.allclose(np.abs((turn @ directions[:, :, None])[:, 0, 0]), np.linalg.norm(directions, axis=1))


def many_keys(seed: int = 0):
    rng = np.random.default_rng(seed)
    examples = np.repeat([11, 5, 900], 120)
    t = np.concatenate([np.sort(rng.choice(512, size=120, replace=False)) for _ in range(3)])
    keys = rows(rng.normal(size=(2, 360, 4)), t, examples=examples, kind="k")
    return keys.take(np.lexsort((keys.positions, keys.example_ids, keys.buckets))), rng


def test_pairs_of_a_bucket_share_document_and_bucket_and_are_two():
    keys, rng = many_keys()
    pairs = draw_pairs(keys, "bucket", 100, rng)
    assert len(pairs) == 100 * len(np.unique(keys.buckets))
    assert (pairs.first != pairs.second).all()
    for column in (keys.example_ids, keys.buckets):
        assert (column[pairs.first] == column[pairs.second]).all()
    assert (keys.buckets[pairs.first] == pairs.buckets).all()


def test_pairs_within_a_distance_are_within_it():
    keys, rng = many_keys()
    pairs = draw_pairs(keys, "distance", 200, rng, 0.05, {11: 512, 5: 2000, 900: 512})
    apart = np.abs(keys.positions[pairs.first] - keys.positions[pairs.second])
    reach = np.where(keys.example_ids[pairs.first] == 5, 100, 25)
    assert (keys.example_ids[pairs.first] == keys.example_ids[pairs.second]).all()
    assert (pairs.first != pairs.second).all() and (apart <= reach).all()
    assert apart.max() > 25
    assert (pairs.buckets == np.maximum(keys.buckets[pairs.first], keys.buckets[pairs.second])).all()


def test_every_partner_is_as_likely_as_the_others():
    keys = rows(np.zeros((1, 4, 2)), np.arange(4))
    pairs = draw_pairs(keys, "bucket", 24_000, np.random.default_rng(0))
    counts = np.zeros((4, 4))
    np.add.at(counts, (pairs.first, pairs.second), 1)
    assert not counts.diagonal().any()
    off = counts[~np.eye(4, dtype=bool)]
    assert np.abs(off - 2000).max() < 5 * np.sqrt(2000)


def test_only_earlier_keys_are_compared():
    keys, rng = many_keys()
    found = measure(model_queries(keys), keys, draw_pairs(keys, "bucket", 10, rng))
    assert (found.key_buckets < found.query_buckets).all()
    last = keys.buckets.max()
    assert len(found.counts) == last * (last + 1) // 2


def test_the_averages_differ_by_their_weights():
    keys, rng = many_keys()
    found = measure(model_queries(keys), keys, draw_pairs(keys, "distance", 40, rng, 0.2, {}))
    assert np.allclose(found.mean("bucket_pairs"), found.values.mean(1))
    assert np.allclose(found.mean("key_pairs"), np.average(found.values, axis=1, weights=found.counts))


def test_a_rigid_head_is_told_from_a_plastic_one(tmp_path: Path):
    """Head 0's queries all point one way, the other heads' point anywhere."""

    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        vectors = noise(layer, kind, positions, rng)
        if kind == "q":
            vectors[:, 0] += 50
        return vectors

    run = planted_run(tmp_path / "run", formula)
    heads = AttentionPlasticity().measure(run).tables["heads"]
    assert len(heads) == 2 * HEADS["q"]
    assert heads.filter(head=0)["plasticity"].max() < 0.1
    assert heads.filter(heads["head"] > 0)["plasticity"].min() > 0.8


def test_variants_agree_where_they_should(tmp_path: Path):
    """On white noise the covariance is diagonal and distance says nothing: all variants measure the same."""
    run = planted_run(tmp_path / "run")
    base = AttentionPlasticity(variant="one_bucket").measure(run).tables["heads"]["plasticity"].to_numpy()
    for changed in (
        {"variant": "thesis"},
        {"variant": "one_bucket_diagonal"},
        {"variant": "near"},
        {"variant": "one_bucket", "average": "key_pairs"},
        {"covariance": "full"},
    ):
        other = AttentionPlasticity(**changed).measure(run).tables["heads"]["plasticity"].to_numpy()
        assert np.abs(other - base).max() < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"covariance": "low"},
        {"pairs": "any"},
        {"average": "x"},
        {"average": "key_pairs"},
        {"variant": "one_bucket", "average": "positions"},
        {"variant": "mine"},
        {"count": 0},
        {"distance": 0.0},
    ],
)
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, object]):
    with pytest.raises(ConfigError):
        AttentionPlasticity(**wrong)  # type: ignore[arg-type]


def test_documents_of_one_bucket_have_nothing_to_compare(tmp_path: Path):
    run = planted_run(tmp_path / "run", lengths=[40, 50])
    with pytest.raises(RunError, match="no bucket of 8 queries"):
        AttentionPlasticity().measure(run)
