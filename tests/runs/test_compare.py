"""Two runs are as far apart as was planted, where it was planted, and a run is not apart from itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.runs import __main__ as verbs
from sniffer.runs.compare import compare
from tests.experiments.planted import noise, planted_run


def shifted(layer_: int, kind_: str, head_: int, by: float) -> Callable:
    """Noise, but of one head of one layer and kind every vector is longer by a share."""

    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        vectors = noise(layer, kind, positions, rng)
        if (layer, kind) == (layer_, kind_):
            vectors[:, head_] *= 1 + by
        return vectors

    return formula


def test_a_run_is_not_apart_from_itself(tmp_path: Path):
    run = planted_run(tmp_path / "a")
    found = compare(run, run)
    assert found.height == 4 and found["rows"].sum() == run.manifest.rows
    assert (found.select("only_first", "only_second", "other_token", "mean", "median", "largest").to_numpy() == 0).all()
    assert np.allclose(found["cosine"], 1)


def test_a_difference_is_found_where_it_was_planted(tmp_path: Path):
    a = planted_run(tmp_path / "a")
    b = planted_run(tmp_path / "b", shifted(1, "q", 2, 0.25))
    found = compare(a, b)
    (off,) = found.filter(pl.col("largest") > 0).iter_rows(named=True)
    assert (off["layer"], off["kind"], off["head"]) == (1, "q", 2)
    assert off["largest"] == pytest.approx(0.25, rel=1e-5) and off["mean"] == pytest.approx(0.25 / 4, rel=1e-5)
    assert off["median"] == 0 and off["cosine"] == pytest.approx(1)


def by_hand(a: Run, b: Run, layer: int, kind: str) -> tuple[float, float, float, int]:
    """Row by row, over a dictionary."""
    tables = [run.scan([layer], [kind]).collect().iter_rows(named=True) for run in (a, b)]
    rows = [
        {(row["head"], row["example_id"], row["position"]): np.array(row["vector"], dtype=float) for row in table}
        for table in tables
    ]
    both = rows[0].keys() & rows[1].keys()
    apart = [np.linalg.norm(rows[0][key] - rows[1][key]) / np.linalg.norm(rows[0][key]) for key in both]
    cosines = [
        rows[0][key] @ rows[1][key] / np.linalg.norm(rows[0][key]) / np.linalg.norm(rows[1][key]) for key in both
    ]
    return float(np.mean(apart)), float(np.median(apart)), float(np.mean(cosines)), len(rows[0].keys() - both)


def test_two_models_at_two_rates_by_hand(run: Callable, checkpoint: Path, tmp_path: Path):
    """Half precision, and fewer positions: those that both keep are compared, statistics of attention too."""
    a = run("sampler.base_rate=40", "capture.attention=[entropy,top]")
    b = run("sampler.base_rate=20", "capture.attention=[entropy,top]", "model.dtype=bfloat16")
    found = compare(a, b)
    for layer in (0, 1):
        for kind in ("q", "k"):
            (row,) = found.filter(layer=layer, kind=kind).iter_rows(named=True)
            mean, median, cosine, alone = by_hand(a, b, layer, kind)
            assert (row["mean"], row["median"]) == pytest.approx((mean, median), rel=1e-6)
            assert row["cosine"] == pytest.approx(cosine) and (row["only_first"], row["only_second"]) == (alone, 0)
            assert alone > 0 and mean > 1e-4
    statistics = found.filter(kind="attention")
    assert statistics["statistic"].to_list() == ["entropy", "top", "top_position"] * 2
    joined = a.attention(layer=1, q_head=0).join(b.attention(layer=1, q_head=0), on=["example_id", "position"])
    largest = (joined["entropy"] - joined["entropy_right"]).abs().max()
    assert statistics.filter(layer=1, statistic="entropy")["largest"][0] >= largest > 0


def test_other_tokens_are_left_out_and_counted(tmp_path: Path):
    a, b = planted_run(tmp_path / "a"), planted_run(tmp_path / "b")
    part = next(part for part in b.manifest.parts if (part.layer, part.kind) == (0, "q"))
    table = pl.read_parquet(b.folder / part.path)
    other = pl.when(pl.col("position") == 3).then(7).otherwise("token_id").cast(pl.Int32)
    table.with_columns(token_id=other).write_parquet(b.folder / part.path)
    wanted = table.filter(pl.col("position") == 3).height
    assert wanted > 0
    (row,) = compare(a, b).filter(layer=0, kind="q").iter_rows(named=True)
    assert row["other_token"] == wanted and row["rows"] == table.height - wanted


def test_the_command_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    planted_run(tmp_path / "a"), planted_run(tmp_path / "b", shifted(0, "k", 1, 0.5))
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert verbs.main([*words, "--to", str(tmp_path / "all.parquet")]) == 0
    said = capsys.readouterr().out
    assert "worst head" in said and "what differs: nothing that is recorded" in said
    assert pl.read_parquet(tmp_path / "all.parquet").filter(layer=0, kind="k")["largest"][0] == pytest.approx(0.5)
    assert verbs.main([*words, "--to", str(tmp_path / "all.parquet")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_what_differs_is_told(run: Callable, capsys: pytest.CaptureFixture):
    a, b = run("dataset.max_tokens=32"), run("dataset.max_tokens=32", "model.dtype=bfloat16")
    assert verbs.main(["compare", str(a.folder), str(b.folder)]) == 0
    assert "device.dtype: float32 in A, bfloat16 in B" in capsys.readouterr().out


def test_runs_with_nothing_in_common_are_refused(tmp_path: Path):
    a, b = planted_run(tmp_path / "a", kinds=("q",)), planted_run(tmp_path / "b", kinds=("k",))
    with pytest.raises(RunError, match="have no layer and kind in common"):
        compare(a, b)
    with pytest.raises(RunError, match="is a folder of several runs"):
        verbs.run(["compare", str(a.folder), str(tmp_path)])
