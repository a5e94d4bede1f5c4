"""Where a run has moments over all positions, analyses of a few rows say what those of all rows say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sniffer.experiments.key_rank import KeyRank
from sniffer.experiments.quantisation import Quantisation
from sniffer.experiments.query_key_gap import QueryKeyGap
from sniffer.experiments.rope_frequencies import RopeFrequencies

KINDS = "capture.kinds=[q,k,q_pre,k_pre]"
MOMENTS = "capture.moments.kinds=[q,k,q_pre,k_pre]"
FEW = "sampler=uniform", "sampler.base_rate=8", "sampler.bucket_size=128", KINDS
ALL = "sampler=all", KINDS

ANALYSES = {
    "key_rank": (KeyRank(), ["rank", "effective_rank"]),
    "quantisation": (Quantisation(bits=[4]), ["largest_channel", "outlier_channels"]),
    "rope_frequencies": (RopeFrequencies(), ["concentration", "largest_concentration", "strongest_share"]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ANALYSES)
def test_a_sample_with_moments_says_what_all_rows_say(run: Callable, name: str):
    analysis, columns = ANALYSES[name]
    true, sampled, exact = (
        analysis.measure(one)
        for one in (run(*ALL), run(*FEW), run(*FEW, MOMENTS))  # type: ignore[attr-defined]
    )
    keys = ["kind", "layer", "head"]
    tables = [result.tables["heads"].sort(keys) for result in (true, sampled, exact)]
    for column in columns:
        wanted, estimate, found = (table[column].to_numpy() for table in tables)
        assert np.allclose(found, wanted, rtol=1e-4), column
        assert column == "outlier_channels" or not np.allclose(estimate, wanted, rtol=1e-4), column
    assert any("from the moments of all" in line for line in exact.findings)
    assert not any("from the moments of all" in line for line in (*true.findings, *sampled.findings))


def test_distances_are_those_of_all_queries_and_keys(run: Callable):
    """Against Mahalanobis by hand, over every row."""
    settings = QueryKeyGap(recall=False, shrinkage=0.01)
    every, exact = run(*ALL), run(*FEW, MOMENTS)
    found = settings.measure(exact).tables["heads"].sort("layer", "head")
    for row in found.iter_rows(named=True):
        q = every.vectors(layer=row["layer"], head=row["head"], kind="q").vectors.astype(np.float64)
        k = every.vectors(layer=row["layer"], head=row["head"] // 2, kind="k").vectors.astype(np.float64)
        covariance = np.cov(k, rowvar=False, bias=True)
        dim = len(covariance)
        spread = 0.99 * covariance + 0.01 * np.trace(covariance) / dim * np.eye(dim)
        for column, x in (("distance_q", q), ("distance_k", k)):
            about = x - k.mean(0)
            squared = np.einsum("nd,de,ne->n", about, np.linalg.inv(spread), about).mean() / dim
            assert row[column] == pytest.approx(np.sqrt(squared), rel=1e-4)


def test_ranks_need_no_rows(run: Callable):
    only = KeyRank().measure(run("sampler.base_rate=0", KINDS, MOMENTS))
    true = KeyRank().measure(run(*ALL))
    keys = ["kind", "layer", "head"]
    assert only.tables["heads"].sort(keys)["rank"].equals(true.tables["heads"].sort(keys)["rank"])
    assert len(only.tables["layers"]) == 0


def test_rows_and_sections_are_not_overruled(run: Callable):
    captured = run(*FEW, MOMENTS)
    by_rows = KeyRank(weights="rows").measure(captured)
    assert not any("from the moments of all" in line for line in by_rows.findings)
