"""The published quantity, beside its definition written out for one pair of keys at a time."""

from __future__ import annotations

from math import erf, sqrt
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sniffer.experiments.attention_plasticity import AttentionPlasticity
from sniffer.experiments.attention_plasticity.prefix import (
    Prefix,
    draw_prefix_pairs,
    householder,
    measure_prefixes,
    model_buckets,
)

from tests.experiments.planted import DIM, HEADS, noise, planted_run, rows

BUCKET = 64


def drifting(seed: int = 0, n: int = 400, dim: int = 5, heads: int = 2):
    """Queries and keys over three documents, with a drift, a mean that changes from bucket to bucket, and weights."""
    rng = np.random.default_rng(seed)
    examples = np.sort(rng.choice([3, 8, 11], size=n))
    t = rng.integers(0, 300, size=n)
    slope = rng.normal(size=(heads, 1, dim)) / 40
    steps = rng.normal(size=(heads, 300 // BUCKET + 1, dim))
    x = rng.normal(size=(heads, n, dim)) + slope * t[:, None] + steps[:, t // BUCKET]
    weights = rng.uniform(0.5, 2, size=n)
    queries = rows(x, t, examples=examples, kind="q", bucket_size=BUCKET, weights=weights)
    keys = rows(rng.normal(size=x.shape), t, examples=examples, kind="k", bucket_size=BUCKET, weights=weights)
    return queries, keys, rng


def by_definition(queries, head: int, bucket: int, delta: np.ndarray) -> float:
    """Equations of the closed form, coordinate by coordinate, in the basis of the Householder reflection."""
    t, w, x = queries.positions.astype(float), queries.weights, queries.vectors[head].astype(float)
    w = w / w.sum()
    beta = (w * (t - w @ t)) @ x / (w @ (t - w @ t) ** 2)
    u = beta / np.linalg.norm(beta) - np.eye(len(beta))[0]
    h = np.eye(len(beta)) - 2 * np.outer(u, u) / (u @ u)
    rotated, d = x @ h.T, h @ delta
    inside = queries.buckets == bucket
    tau = (t[inside].min() + t[inside].max()) / 2
    slope = (w * (t - w @ t)) @ rotated[:, 0] / (w @ (t - w @ t) ** 2)
    start = w @ rotated[:, 0] - slope * (w @ t)
    share = w[inside] / w[inside].sum()
    mu = d[0] * (start + slope * tau)
    v = d[0] ** 2 * (w @ (rotated[:, 0] - start - slope * t) ** 2)
    for j in range(1, len(beta)):
        mean = share @ rotated[inside, j]
        mu += d[j] * mean
        v += d[j] ** 2 * (share @ (rotated[inside, j] - mean) ** 2)
    p = (1 + erf(mu / sqrt(v) / sqrt(2))) / 2
    return 4 * p * (1 - p)


def test_it_is_the_definition_pair_by_pair():
    queries, keys, rng = drifting()
    model = model_buckets(queries, "diagonal", 8)
    for place, bucket in enumerate(model.buckets):
        first, second = draw_prefix_pairs(keys, keys.buckets < bucket, 20, np.random.default_rng(bucket))
        if not len(first):
            continue
        found = measure_prefixes(queries, keys, model, 20, rng, None)
        assert bucket in found.buckets
        for head in range(2):
            from sniffer.experiments.attention_plasticity.core import plasticity, preference

            deltas = keys.vectors[:, first].astype(float) - keys.vectors[:, second]
            values = plasticity(preference(model.mean[:, place], model.covariance[:, place], deltas))
            wanted = [by_definition(queries, head, bucket, delta) for delta in deltas[head]]
            assert values[head] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_reflection_takes_the_drift_to_the_first_axis():
    directions = np.array([[3.0, 4, 0], [2.0, 0, 0], [-1.0, 0, 0], [0, 0, 0], [1.0, 1e-9, 0], [0, 0, -2]])
    turn = householder(directions)
    assert np.allclose(turn @ turn, np.eye(3)) and np.allclose(turn, turn.swapaxes(1, 2))
    there = (turn @ directions[:, :, None])[:, :, 0]
    assert np.allclose(there, np.linalg.norm(directions, axis=1)[:, None] * np.eye(3)[0])


def test_pairs_come_from_what_is_before_the_query_and_within_its_window():
    queries, keys, rng = drifting()
    model = model_buckets(queries, "diagonal", 8)
    for window in (None, 100):
        found = measure_prefixes(queries, keys, model, 200, rng, window)
        assert found.buckets.min() > 0
        for bucket, tau, later, apart, away in zip(
            found.buckets, found.positions, found.key_buckets, found.apart, found.away, strict=True
        ):
            assert (later < bucket).all() and (apart >= 0).all()
            # The earlier key of a pair lies away + apart / 2 before the query.
            assert window is None or (away + apart / 2 < window).all()
            assert (away + apart / 2 <= tau + 1e-9).all()
    assert apart.max() > 0


def test_two_keys_of_a_document_are_drawn_by_their_weights():
    keys = rows(np.zeros((1, 6, 2)), np.arange(6), examples=np.array([1, 1, 1, 2, 2, 7]), kind="k", bucket_size=64)
    keys = keys.__class__(**{**vars(keys), "weights": np.array([1.0, 2.0, 5.0, 4.0, 4.0, 9.0])})
    first, second = draw_prefix_pairs(keys, np.ones(6, dtype=bool), 60_000, np.random.default_rng(0))
    counts = np.zeros((6, 6))
    np.add.at(counts, (first, second), 1 / 60_000)
    assert not counts.diagonal().any() and not counts[5].any() and not counts[:, 5].any()
    expected = np.zeros((6, 6))
    for document in ([0, 1, 2], [3, 4]):
        for one in document:
            for other in set(document) - {one}:
                rest = sum(keys.weights[third] for third in document if third != one)
                expected[one, other] = keys.weights[one] / 16 * keys.weights[other] / rest
    assert np.abs(counts - expected).max() < 5 * sqrt(0.25 / 60_000)


def test_no_document_with_two_keys_gives_no_pair():
    keys = rows(np.zeros((1, 3, 2)), np.arange(3), examples=np.array([1, 2, 3]), kind="k", bucket_size=64)
    assert len(draw_prefix_pairs(keys, np.ones(3, dtype=bool), 5, np.random.default_rng(0))[0]) == 0


def test_means_count_positions_and_fifths_are_of_the_context():
    nothing = tuple(np.zeros(1, np.int64) for _ in range(3))
    found = Prefix(
        np.array([1, 2, 3]),
        np.array([150.0, 250, 400]),
        np.array([[100, 200], [200, 300], [300, 500]]),
        tuple(np.full((1, 4), value) for value in (0.9, 0.5, 0.2)),
        nothing,
        nothing,
        nothing,
        np.zeros((1, 3)),
    )
    assert found.overall(found.profile) == pytest.approx([(0.9 * 100 + 0.5 * 100 + 0.2 * 200) / 400])
    fifths = found.fifths(500)
    assert np.isnan(fifths[0, 0])  # nothing was measured before position 100
    assert fifths[0, 1:].tolist() == pytest.approx([0.9, 0.5, 0.2, 0.2])
    assert found.fifths(1000)[0, :2].tolist() == pytest.approx([0.9, (0.5 * 100 + 0.2 * 100) / 200])


def position_wins(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Queries that drift along an axis on which keys say where they are: the later, the more settled."""
    vectors = noise(layer, kind, positions, rng)
    vectors[:, :, 0] += positions[:, None] / (25 if kind == "k" else 60)
    return vectors


def test_plasticity_falls_where_queries_drift_along_the_positions_of_keys(tmp_path: Path):
    """The theorem: it decays with the position of the query. Keys of one bucket, which are near, do not show it."""
    run = planted_run(tmp_path / "run", position_wins, lengths=[640, 600, 620, 640])
    tables = AttentionPlasticity().measure(run).tables
    heads = tables["heads"]
    assert (heads["drop"].drop_nulls() > 0.1).all() and heads["last"].is_not_null().all()
    near = AttentionPlasticity(variant="one_bucket").measure(run).tables["heads"]
    assert near["drop"].max() < heads["drop"].drop_nulls().min() if heads["drop"].is_not_null().any() else True
    fifths = tables["fifths"].filter(head=0, layer=0).sort("fifth")["plasticity"].drop_nulls().to_list()
    assert fifths == sorted(fifths, reverse=True) and len(fifths) >= 4
    far = tables["distances"].group_by("keys_apart").agg(pl.col("plasticity").mean()).sort("keys_apart")
    assert far["plasticity"][0] > far["plasticity"][-1] + 0.2


def test_counting_real_queries_gives_what_gaussian_ones_are_said_to(tmp_path: Path):
    run = planted_run(tmp_path / "run", position_wins, lengths=[640, 600, 620, 640, 640, 640])
    heads = AttentionPlasticity().measure(run).tables["heads"]
    assert heads["beyond_gaussian"].abs().max() < 0.05
    assert np.allclose(heads["empirical"] - heads["plasticity"], heads["beyond_gaussian"])


def test_a_mean_of_a_bucket_is_not_taken_for_its_variance():
    """Buckets with means of their own, off any line: a straight drift counts these as spread."""
    rng = np.random.default_rng(0)
    t = np.arange(256)
    x = rng.normal(size=(1, 256, 4)) * 0.1
    x[0, :, 0] += t / 10
    x[0, :, 1] += np.where((t // BUCKET) % 3 == 0, -5.0, 5.0)  # -, +, +, -: no drift
    model = model_buckets(rows(x, t, kind="q", bucket_size=BUCKET), "full", 8)
    spread = model.covariance[0]
    assert np.abs(np.linalg.eigvalsh(spread[1])).max() < 1.5
    assert model.mean[0, 1, 1] > 3 and model.mean[0, 0, 1] < -3


def test_tables_agree_with_one_another(tmp_path: Path):
    tables = AttentionPlasticity().measure(planted_run(tmp_path / "run")).tables
    cells, profile = tables["bucket_pairs"], tables["profile"]
    weighted = cells.group_by("layer", "head", "query_bucket").agg(
        ((pl.col("plasticity") * pl.col("key_pairs")).sum() / pl.col("key_pairs").sum()).alias("mean")
    )
    both = profile.join(weighted, on=["layer", "head", "query_bucket"])
    assert len(both) == len(profile) and np.allclose(both["mean"], both["plasticity"])
    assert tables["distances"].group_by("layer", "head").agg(pl.col("key_pairs").sum())["key_pairs"].n_unique() == 1
    assert len(tables["heads"]) == 2 * HEADS["q"] and DIM > 1
