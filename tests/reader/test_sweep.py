from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from sniffer import open_run
from sniffer.errors import RunError
from sniffer.reader.index import typed
from sniffer.reader.job_folders import in_order
from sniffer.reader.sweep import Sweep
from sniffer.storage.manifest import Manifest
from tests.helpers_storage import make_run


def make_job(sweep: Path, name: str, overrides: Sequence[str], **choices: Any) -> None:
    folder = make_run(sweep / name, **choices).folder
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    make_job(tmp_path, "0", ["sampler.base_rate=0.5", "capture.layers=[0]"], layers=(0,))
    make_job(tmp_path, "1", ["sampler.base_rate=2", "capture.layers=[2]"], layers=(2,))
    make_job(tmp_path, "10", ["sampler.base_rate=2", "+extra=yes"], status="interrupted")
    (tmp_path / "2").mkdir()  # failed before its manifest
    opened = open_run(tmp_path)
    assert isinstance(opened, Sweep)
    return opened


def test_jobs_come_in_their_order_with_their_overrides(sweep: Sweep):
    jobs = sweep.jobs()
    assert jobs["job"].to_list() == ["0", "1", "10"]
    assert jobs["sampler.base_rate"].to_list() == [0.5, 2.0, 2.0]
    assert jobs["capture.layers"].to_list() == ["[0]", "[2]", None]
    assert jobs["extra"].to_list() == [None, None, "yes"]
    assert jobs["status"].to_list() == ["complete", "complete", "interrupted"]
    assert jobs["rows"].to_list() == [run.manifest.rows for run in sweep.runs.values()]
    assert not sweep.complete


def test_scan_has_all_jobs_rows_and_overrides(sweep: Sweep):
    table = sweep.scan(inclusion_probability=True).collect()
    assert table.columns[:4] == ["job", "sampler.base_rate", "capture.layers", "extra"]
    for job, run in sweep.runs.items():
        mine = table.filter(job=job)
        assert mine["sampler.base_rate"].unique().to_list() == [0.5 if job == "0" else 2.0]
        alone = run.scan(inclusion_probability=True).select(pl.exclude("vector")).collect()
        assert mine.select(alone.columns).equals(alone)


def test_scan_takes_from_each_job_what_it_has(sweep: Sweep):
    rows = sweep.scan(layers=[2], kinds=["k"]).select("job", "layer", "kind").unique().collect()
    assert sorted(rows.rows()) == [("1", 2, "k"), ("10", 2, "k")]
    assert isinstance(sweep.scan(layers=[2]).collect_schema()["vector"], pl.Array)
    with pytest.raises(RunError, match="layer 1 .* layers 0, 2"):
        sweep.scan(layers=[1])
    with pytest.raises(RunError, match="kind v .* kinds k, q"):
        sweep.scan(kinds=["v"])


def test_vectors_of_different_lengths_meet_as_lists(tmp_path: Path):
    make_job(tmp_path, "0", ["model=a"], kinds=("q",))
    make_job(tmp_path, "1", ["model=b"], kinds=("q",), dims={"q": 4})
    table = open_run(tmp_path).scan().collect()
    assert table.schema["vector"] == pl.List(pl.Float32)
    assert table.group_by("model").agg(pl.col("vector").list.len().first()).sort("model")["vector"].to_list() == [8, 4]


def test_a_folder_named_for_its_overrides(tmp_path: Path):
    make_job(tmp_path, "sampler.base_rate=1", ["sampler.base_rate=1"])
    opened = open_run(tmp_path)
    assert opened.scan().collect().height == sum(run.manifest.rows for run in opened.runs.values())
    assert opened.complete


def test_a_folder_of_plain_runs_opens_with_each_run_once(tmp_path: Path):
    """Wherever they lie: shards by separate commands, copied from other machines; copies of them are the same runs."""
    originals = {name: make_run(tmp_path / name).folder for name in ("b", "host/0", "host/10", "host/2", "a_published")}
    rows = sum(Manifest.load(folder).rows for folder in originals.values())

    def same() -> bool:
        opened = open_run(tmp_path)
        assert isinstance(opened, Sweep)
        return list(opened.runs) == in_order(originals) and len(opened.scan().collect()) == rows

    assert same()
    shutil.copytree(tmp_path / "b", tmp_path / "copies" / "of_b")
    shutil.copytree(tmp_path / "b", tmp_path / ".publishing-x")
    make_run(tmp_path / "host" / "0_reproduced")
    (make_run(tmp_path / "elsewhere").folder / ".reproduces").write_text(Manifest.load(tmp_path / "b").digest)
    assert same()


def test_a_reproduction_alone_is_a_run(tmp_path: Path):
    (make_run(tmp_path / "x" / "here").folder / ".reproduces").write_text("the digest of a run that is elsewhere")
    make_run(tmp_path / "x" / "run_reproduced")
    assert sorted(open_run(tmp_path / "x").runs) == ["here", "run_reproduced"]


def test_a_folder_of_sweeps_has_the_jobs_of_each(tmp_path: Path):
    for name in ("one", "two"):
        make_job(tmp_path / name, "0", ["seed=1"])
        make_job(tmp_path / name, "1", ["seed=2"])
        (tmp_path / name / "multirun.yaml").write_text("")
        make_run(tmp_path / name / "0_again")
    make_run(tmp_path / "alone")
    assert list(open_run(tmp_path).runs) == ["alone", "one/0", "one/1", "two/0", "two/1"]


def test_jobs_lie_in_order_of_their_numbers_at_every_level():
    names = ["b/2", "10", "a/10/1", "9", "a/9/2", "b/10", "a/9/10"]
    assert in_order(names) == ["9", "10", "a/9/2", "a/9/10", "a/10/1", "b/2", "b/10"]


@pytest.mark.parametrize("name", ["../x", "/etc", ""])
def test_an_index_that_leaves_the_sweep_is_refused(tmp_path: Path, name: str):
    make_job(tmp_path / "sweep", "0", [])
    make_run(tmp_path / "x")
    pl.DataFrame({"path": [name], "error": [None]}, {"path": pl.String, "error": pl.String}).write_parquet(
        tmp_path / "sweep" / "sweep.parquet"
    )
    with pytest.raises(RunError, match="outside the sweep"):
        open_run(tmp_path / "sweep")


def test_unreadable_overrides(tmp_path: Path):
    make_job(tmp_path, "0", [])
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("[")
    with pytest.raises(RunError, match=r"overrides\.yaml"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["1", None, "-2"], [1, None, -2]),
        (["1", "1e-3"], [1.0, 0.001]),
        (["true", "False"], [True, False]),
        (["1", "x"], ["1", "x"]),
        (["[0]", "null"], ["[0]", "null"]),
        ([str(2**63 - 1), str(1 - 2**63)], [2**63 - 1, 1 - 2**63]),
        (["1", str(2**63)], ["1", str(2**63)]),
        (["1", None, "9" * 400], ["1", None, "9" * 400]),
        (["9" * 5000, "1e400"], [float("inf")] * 2),
    ],
)
def test_typed(texts: list[str | None], values: list[Any]):
    assert typed(texts) == values
    assert list(map(type, typed(texts))) == list(map(type, values))
