"""The planar model finds what was planted, and its lemma holds to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sniffer.experiments.common.moments import moments, moments_of, pool
from sniffer.experiments.position_geometry import PositionGeometry
from sniffer.experiments.position_geometry.pca import components, linear_share, taxonomy
from sniffer.experiments.position_geometry.plane import Plane, basis, plane
from sniffer.experiments.position_geometry.rings import rings

from tests.experiments.planted import HEADS, noise, planted_run, rows

N, DIM = 400, 8


def drifting(seed: int = 0, noise: float = 0.1, heads: int = 3):
    """Queries and keys that drift along known directions at known rates, apart by a known gap."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.choice(4096, size=N, replace=False))
    axes = np.linalg.qr(rng.normal(size=(heads, DIM, DIM)))[0]
    a, b = axes[:, :, 0], axes[:, :, 1]
    q = noise * rng.normal(size=(heads, N, DIM)) + 2 * b[:, None] + (3 + 0.002 * t[:, None]) * a[:, None]
    k = noise * rng.normal(size=(heads, N, DIM)) - 2 * b[:, None] + (1 + 0.004 * t[:, None]) * a[:, None]
    return t, a, b, q, k


def fitted(t: np.ndarray, q: np.ndarray, k: np.ndarray, weights: np.ndarray | None = None) -> Plane:
    weights = np.ones(len(t)) if weights is None else weights
    return plane(moments(q, t, weights), moments(k, t, weights))


def test_planted_drift_is_recovered():
    t, a, b, q, k = drifting(noise=0.01)
    model = fitted(t, q, k)
    assert np.allclose((model.a * a).sum(1), 1, atol=1e-5)
    assert np.allclose((model.b * b).sum(1), 1, atol=1e-5)
    assert np.allclose(model.alpha_q, 0.002, rtol=1e-2)
    assert np.allclose(model.alpha_k, 0.004, rtol=1e-2)
    assert (model.r_q > 0.999).all() and (model.r_k > 0.999).all()
    assert np.allclose(model.mu_q_a, 3 + 0.002 * t.mean(), rtol=1e-2)
    assert np.allclose(model.bias_strength, (3 + 0.002 * t.mean()) * 0.004, rtol=2e-2)


def test_noise_has_no_drift_to_speak_of():
    rng = np.random.default_rng(0)
    t, x = np.arange(5000), rng.normal(size=(4, 5000, DIM))
    both = moments(x, t, np.ones(5000))
    # Each of dim directions explains about 1 / n by chance, of 1 / dim of the variance.
    assert (linear_share(both) < 10 / 5000).all()


@pytest.mark.parametrize("seed", range(5))
def test_nothing_off_the_drift_axis_goes_with_position(seed: int):
    """The lemma, checked on the projected rows themselves rather than on moments."""
    t, _, _, q, k = drifting(seed, noise=1.0)
    weights = np.random.default_rng(seed).uniform(0.5, 3, size=N)
    model = fitted(t, q, k, weights)
    x, both = np.concatenate([q, k], axis=1), np.concatenate([weights, weights])
    rest = x @ basis(model.a, model.b)[:, :, 1:]
    line = np.concatenate([t, t]).astype(float)
    for head in rest:
        for column in head.T:
            table = np.cov(np.stack([column, line]), aweights=both)
            assert abs(table[0, 1]) / np.sqrt(table[0, 0] * table[1, 1]) < 1e-12
    assert (model.residual_r < 1e-12).all()


def test_the_basis_is_orthonormal_and_keeps_every_product():
    t, _, _, q, k = drifting(noise=1.0)
    model = fitted(t, q, k)
    full = basis(model.a, model.b)
    assert np.allclose(full.swapaxes(1, 2) @ full, np.eye(DIM), atol=1e-12)
    assert np.allclose(full[:, :, 0], model.a) and np.allclose(full[:, :, 1], model.b)
    assert np.allclose(((q @ full) * (k @ full)).sum(2), (q * k).sum(2), atol=1e-9)


def test_a_rotated_space_gives_the_same_numbers():
    t, _, _, q, k = drifting(noise=1.0)
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(DIM, DIM)))[0]
    here, there = fitted(t, q, k), fitted(t, q @ turn, k @ turn)
    for name in ("r_q", "r_k", "alpha_q", "alpha_k", "mu_q_a", "variance_a", "variance_b", "bias_strength"):
        assert np.allclose(getattr(here, name), getattr(there, name)), name


def test_turning_all_keys_around_turns_the_bias():
    t, _, _, q, k = drifting()
    late = fitted(t, q, k)
    early = fitted(t, q, k[:, ::-1])
    assert (late.bias_strength > 0).all() and (early.bias_strength < 0).all()


def test_heads_that_are_still_have_no_direction_and_no_numbers_that_are_undefined():
    model = fitted(np.arange(20), np.ones((1, 20, DIM)), np.ones((1, 20, DIM)))
    assert not model.bias_strength.any() and not model.variance_a.any()
    assert np.isfinite(basis(model.a, model.b)).all()


def test_components_are_sorted_signed_and_add_up():
    t, _, _, q, k = drifting(noise=1.0)
    found = components(moments(q, t, np.ones(N)), moments(k, t, np.ones(N)))
    assert np.allclose(found.explained.sum(1), 1)
    assert (np.diff(found.explained, axis=1) <= 1e-12).all()
    assert (found.r_q >= 0).all()
    for head in range(len(q)):
        score = q[head] @ found.axes[head, :, 0]
        assert found.r_q[head, 0] == pytest.approx(np.corrcoef(score, t)[0, 1])


def test_a_straight_line_explains_what_it_was_made_to():
    rng = np.random.default_rng(0)
    t = np.arange(20_000)
    x = rng.normal(size=(1, 20_000, 4))
    x[0, :, 0] += t / t.std() * 2
    # Along the first axis variance 1 + 4, of which 4 by the line; three more of variance 1.
    assert linear_share(moments(x, t, np.ones(len(t)))) == pytest.approx(4 / 8, abs=0.01)


def test_taxonomy_has_a_name_for_each_corner():
    r_q = np.array([0.9, 0.9, 0.1, 0.1, 0.5, -0.9])
    r_k = np.array([0.8, 0.2, 0.9, 0.2, 0.5, 0.7])
    assert taxonomy(r_q, r_k) == [
        "position-dominated", "q-positional", "k-positional", "content-focused", "mixed", "position-dominated",
    ]  # fmt: skip


@pytest.mark.parametrize("speed", [0.01, 0.3, 2.0, -1.1])
def test_a_planted_turn_is_found_at_its_speed(speed: float):
    rng = np.random.default_rng(0)
    t = rng.integers(0, 2048, size=1400)
    x = 0.1 * rng.normal(size=(2, len(t), 6))
    x[:, :, 2] += np.cos(speed * t + 0.4)
    x[:, :, 3] += np.sin(speed * t + 0.4)
    found = rings(np.broadcast_to(np.eye(6), (2, 6, 6)), x, t, np.ones(len(t)))
    assert (found.explained[:, 0] > 0.93).all()
    assert np.allclose(np.abs(found.speed[:, 0]), abs(speed), atol=np.pi / 2048)
    assert (found.explained[:, 1:] < 0.05).all()
    assert np.allclose(found.share.sum(1), 1)


def test_the_table_has_a_row_per_head_and_follows_the_planted_layer(tmp_path: Path):
    """Layer 1 drifts, layer 0 does not."""

    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        vectors = noise(layer, kind, positions, rng)
        vectors[:, :, 0] += 3 + layer * 0.05 * positions[:, None]
        return vectors

    result = PositionGeometry().measure(planted_run(tmp_path / "run", formula))
    heads = result.tables["heads"]
    assert len(heads) == 2 * HEADS["q"]
    assert heads.filter(layer=1)["r_k"].min() > 0.9 > heads.filter(layer=0)["r_k"].max()
    late = heads.filter(layer=1)
    assert np.allclose(late["alpha_k"], 0.05, atol=0.01)
    assert np.allclose(late["bias_logits_per_1000"], late["bias_strength"] * 500)
    assert not any(column.has_nulls() for column in heads.drop("rope").iter_columns())
    points = result.tables["plane_points"]
    assert points.group_by("layer", "head", "kind").len()["len"].max() <= 100


def test_weights_matter_only_where_sampling_was_uneven():
    t, _, _, q, k = drifting(noise=1.0)
    even = fitted(t, q, k, np.full(N, 7.0))
    assert np.allclose(even.alpha_k, fitted(t, q, k).alpha_k)
    assert moments_of(rows(q, t)).weight == N
    assert pool(moments_of(rows(q, t)), moments_of(rows(k, t))).weight == 2 * N
