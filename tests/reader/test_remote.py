"""A run at a URL is the run that was copied there, and of its files only what is asked for is fetched."""

from __future__ import annotations

import os
import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fsspec.registry import _registry as fsspec_registry
from polars.testing import assert_frame_equal

from sniffer import open_run
from sniffer.errors import RunError
from sniffer.reader.remote_scan import Condition, conjuncts
from sniffer.reader.run import Run
from sniffer.reader.sweep import Sweep
from sniffer.storage.remote import RemotePath, folder_at
from tests.helpers_remote import copy_to, counting
from tests.helpers_storage import HEADS, make_run

DIM = 512
"""So that one head's rows are many times what is fetched of a footer."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run, and the same one at a URL."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", parts=2, dims={"q": DIM, "k": DIM}).folder
    here, there = open_run(folder), open_run(copy_to(folder, "memory://bucket/runs/one"))
    assert isinstance(here, Run) and isinstance(there, Run)
    return here, there


def fetched_by(run: Run, query: pl.LazyFrame) -> tuple[pl.DataFrame, Counter[str]]:
    with counting(str(run.folder)) as fetched:
        return query.collect(), fetched


def test_all_that_a_run_gives_is_the_same(both: tuple[Run, Run]):
    here, there = both
    assert (there.manifest, there.config, there.layers, there.kinds) == (
        here.manifest,
        here.config,
        here.layers,
        here.kinds,
    )
    assert there.examples().equals(here.examples())
    for layer, kind in sorted(here.all_captured):
        for head in range(HEADS[kind]):
            one, other = (run.vectors(layer=layer, head=head, kind=kind) for run in both)
            assert one.vectors.tobytes() == other.vectors.tobytes()
            assert np.array_equal(one.positions, other.positions) and np.array_equal(one.buckets, other.buckets)
    one, other = (run.pairs(layer=0, q_head=3) for run in both)
    assert one.q.tobytes() == other.q.tobytes() and one.k.tobytes() == other.k.tobytes()
    first, second = (next(iter(run.batches(layer=2, kind="k", size=16, shuffle=1))) for run in both)
    assert first.vectors.tobytes() == second.vectors.tobytes()


QUERIES = {
    "all": lambda rows: rows,
    "kind": lambda rows: rows.filter(pl.col("kind") == "k"),
    "layer and head": lambda rows: rows.filter(pl.col("layer") == 2, pl.col("head") == 1),
    "bucket": lambda rows: rows.filter(pl.col("bucket").is_in([0, 2]), kind="q").select("position", "head"),
    "position": lambda rows: rows.filter((pl.col("position") < 6) | (pl.col("position") > 100)),
    "either": lambda rows: rows.filter((pl.col("head") == 0) | (pl.col("kind") == "k")).select("vector"),
    "nothing": lambda rows: rows.filter(pl.col("head") == 77),
    "first": lambda rows: rows.head(5),
    "first of some": lambda rows: rows.filter(pl.col("position") > 20).head(5),
    "some of the first": lambda rows: rows.head(50).filter(pl.col("position") > 20),
    "reckoned": lambda rows: (
        rows.group_by("layer", "kind").agg(pl.len(), pl.col("position").sum()).sort("layer", "kind")
    ),
    "of all": lambda rows: rows.filter(pl.col("position") == pl.col("position").max()),
}


@pytest.mark.parametrize("query", QUERIES)
def test_a_scan_is_that_of_the_local_run(both: tuple[Run, Run], query: str):
    here, there = (QUERIES[query](run.scan(inclusion_probability=True)).collect() for run in both)
    assert_frame_equal(here, there)


def test_a_head_costs_a_head(both: tuple[Run, Run]):
    _, there = both
    whole = {part.path: part.bytes for part in there.manifest.parts}
    wanted = [part.path for part in there.manifest.parts_of(0, "q")]
    n_rows = sum(part.rows for part in there.manifest.parts_of(0, "q"))
    with counting(str(there.folder)) as fetched:
        found = there.vectors(layer=0, head=2, kind="q")
    assert fetched.keys() == set(wanted)
    of_head = found.vectors.nbytes
    footers = len(wanted) * (64 << 10)
    assert of_head < fetched.total() < 1.3 * of_head + footers < sum(whole[path] for path in wanted)
    with counting(str(there.folder)) as again:
        there.vectors(layer=0, head=3, kind="q")
    assert of_head < again.total() < 1.3 * of_head  # the footers are known by now
    assert n_rows == HEADS["q"] * len(found)


def test_a_query_fetches_what_its_filter_leaves(both: tuple[Run, Run]):
    _, there = both
    rows, fetched = fetched_by(there, there.scan().filter(pl.col("layer") == 0, pl.col("kind") == "k"))
    assert fetched.keys() == {part.path for part in there.manifest.parts_of(0, "k")} and len(rows)
    all_heads = fetched.total()
    _, fetched = fetched_by(there, there.scan([0], ["k"]).filter(pl.col("head") == 1))
    assert 0 < fetched.total() < 0.75 * all_heads
    _, fetched = fetched_by(there, there.scan([0], ["k"]).filter(pl.col("head") == 9))
    assert not fetched.total()
    for nothing in (pl.col("bucket") == 99, pl.col("position") >= 10_000, (pl.col("position") + 1) % 500 == 0):
        assert not fetched_by(there, there.scan([0], ["q"]).filter(nothing))[1].total()
    _, every = fetched_by(there, there.scan([0], ["q"]))
    _, slim = fetched_by(there, there.scan([0], ["q"]).select("position", "example_id"))
    assert slim.total() < 0.2 * every.total()


def test_a_condition_is_tried_on_what_a_footer_tells():
    schema = pl.Schema({"bucket": pl.Int32(), "head": pl.Int16()})
    odd = Condition((pl.col("bucket") % 2 == 1) & (pl.col("bucket") != 3), schema)
    assert odd.of_spans("bucket", [(0, 0), (0, 1), (2, 4), (3, 3), (4, 9)]).tolist() == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert odd.of_spans("bucket", [(0, 1 << 30), (2, 2)]).tolist() == [True, True]  # too many to try
    heads = pl.DataFrame({"head": [0, 1, None]}, schema={"head": pl.Int16()})
    assert Condition(pl.col("head") > 0, schema).of_constants(heads).tolist() == [False, True, True]
    assert odd.of_constants(heads).tolist() == [True, True, True]


def test_conditions_are_those_of_the_filter():
    a, b, c = pl.col("a") > 1, pl.col("b") == 2, pl.col("c").is_in([1])
    assert [str(one) for one in conjuncts(a & (b & c))] == [str(one) for one in (a, b, c)]
    assert [str(one) for one in conjuncts(a | b)] == [str(a | b)]
    assert [str(one) for one in conjuncts((a | b) & c)] == [str(a | b), str(c)]


def test_a_folder_of_runs_at_a_url(tmp_path: Path):
    for number in (0, 1):
        folder = make_run(tmp_path / str(number), first=10 * number).folder
        copy_to(folder, f"memory://sweep/{number}")
        (folder / ".hydra").mkdir()
        (folder / ".hydra/overrides.yaml").write_text(f"- seed={number}\n")
        copy_to(folder, f"memory://sweep/{number}")
    here, there = open_run(tmp_path), open_run("memory://sweep")
    assert isinstance(here, Sweep) and isinstance(there, Sweep)
    assert list(there.runs) == ["0", "1"] and there.overrides == here.overrides
    assert_frame_equal(here.scan().collect(), there.scan().collect())
    assert there.jobs()["path"].to_list() == ["memory://sweep/0", "memory://sweep/1"]


def test_a_path_at_a_url_is_a_path_and_no_place_on_this_machine(both: tuple[Run, Run]):
    folder = both[1].folder
    assert isinstance(folder, Path) and str(folder) == "memory://bucket/runs/one" and folder.name == "one"
    part = both[1].manifest.parts[0].path
    assert str(folder / part) == f"memory://bucket/runs/one/{part}" and (folder / part).is_file()
    assert (folder / part).relative_to(folder).as_posix() == part and (folder / "captures").is_dir()
    assert folder == RemotePath("memory://bucket/runs/one") == pickle.loads(pickle.dumps(folder))
    assert not (folder / "none").exists() and "captures" in {one.name for one in folder.iterdir()}
    with pytest.raises(RunError, match="memory://bucket/runs/one is a URL, and this is done with a folder of this"):
        folder.mkdir()
    with pytest.raises(RunError, match="is a URL"):
        os.path.isdir(folder)
    assert folder_at("a") == Path("a").absolute() and folder_at("file:///a/b") == Path("/a/b")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("memory://bucket/none", "memory://bucket/none has no file: check the address and your access"),
        ("memory://bucket/runs/one/captures", "is not a run folder: it has no manifest.json"),
        ("https://host/run", "https://host/run is no URL of a folder: wanted s3://, gs://, hf://"),
        ("s3://key:secret@bucket/run", r"^s3://... has a password in its URL"),
        ("s3://", "names no folder: write it as s3://bucket/folder"),
        ("zip://a::s3://bucket/a.zip", "is no URL of a folder"),
    ],
)
def test_what_cannot_be_opened_is_one_line(both: tuple[Run, Run], url: str, told: str):
    with pytest.raises(RunError, match=told) as raised:
        open_run(url)
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(fsspec_registry, scheme, raising=False)  # where another test has met it
    with pytest.raises(RunError, match=rf"needs {package}: pip install 'qk-sniffer\[remote\]'"):
        open_run(f"{scheme}://bucket/run")
