"""A dataset that is streamed has the documents of the downloaded one, and reads no more than it must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sniffer.dataset.hub import Hub
from sniffer.dataset.source import Shard
from sniffer.errors import DatasetError
from sniffer.storage.same_run import differences

ROWS = [{"id": f"doc-{n}", "n": n, "text": f"the cat number {n}", "ids": [n, n + 1]} for n in range(12)]


@pytest.fixture(params=["jsonl", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"id_column": "id", "max_examples": 5},
        {"max_examples": 50, "shard": Shard(1, 3)},
        {"where": "n > 3", "max_examples": 4},
        {"shuffle_seed": 2, "max_examples": 4, "id_column": "id"},
    ],
)
def test_streamed_documents_are_those_of_the_downloaded_split(folder: Path, keys: dict[str, Any]):
    streamed, whole = (Hub(name=str(folder), streaming=told, **keys) for told in (True, False))
    assert list(streamed.texts()) == list(whole.texts()) and len(streamed) == len(whole)
    assert streamed.describe()["streaming"] and not whole.describe()["streaming"]
    assert streamed.describe()["bytes"] == whole.describe()["bytes"] and "sha256" not in streamed.describe()


def test_left_alone_it_streams_where_that_suits(folder: Path, monkeypatch: pytest.MonkeyPatch):
    name, place = str(folder), "sniffer.dataset.hub"
    assert Hub(name=name, max_examples=3).streams
    assert not Hub(name=name).streams
    assert not Hub(name=name, max_examples=3, shuffle_seed=1).streams
    assert not Hub(name=name, max_examples=3, streaming=False).streams
    size = sum(file.stat().st_size for file in folder.iterdir())
    monkeypatch.setattr(f"{place}.disk_free", lambda: size - 1)
    assert Hub(name=name).streams and Hub(name=name, max_examples=3, shuffle_seed=1).streams
    monkeypatch.setattr(f"{place}.disk_free", lambda: size)
    assert not Hub(name=name).streams
    assert "streaming" not in Hub(name=name, max_examples=3).describe()
    assert list(Hub(name=name, max_examples=3).texts()) == list(Hub(name=name).texts())[:3]
    monkeypatch.setattr(f"{place}.disk_free", lambda: 1)
    assert not Hub(name=name).streams  # what is prepared takes no more
    # Offline there is nothing but the copy in the cache, which is no stream.
    monkeypatch.setattr(f"{place}.hub_commit", lambda *_: None)
    assert not Hub(name="owner/name", max_examples=3).streams
    monkeypatch.setattr(f"{place}.hub_commit", lambda *_: "a" * 40)
    assert Hub(name="owner/name", max_examples=3).streams


def test_whether_it_streamed_is_no_difference_between_runs(folder: Path):
    streamed, whole = (Hub(name=str(folder), max_examples=4, streaming=told).describe() for told in (None, False))
    assert not differences({"dataset": whole}, {"dataset": streamed})
    assert differences({"dataset": whole}, {"dataset": {**streamed, "max_examples": 5}})
    assert not differences({"config": {"dataset": {"streaming": False}}}, {"config": {"dataset": {"streaming": None}}})


def test_what_is_wrong_is_one_line(folder: Path):
    for keys in ({"text_column": "body"}, {"text_column": "n"}, {"split": "nope"}):
        with pytest.raises(DatasetError, match="no column 'body'|not text|nope"):
            Hub(name=str(folder), streaming=True, **keys).check()


def test_two_documents_of_a_large_folder_cost_a_small_part_of_it(tmp_path: Path):
    """Counted by the system, in a process of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    row = json.dumps({"text": "the cat sat on the mat " * 400}) + "\n"
    for number in range(16):
        (folder / f"{number:02}.jsonl").write_text(row * 1000)
    size = sum(file.stat().st_size for file in folder.iterdir())
    check = (
        "import sys, psutil, datasets, polars, pyarrow.parquet\n"
        "from sniffer.dataset.hub import Hub\n"
        "before = psutil.Process().io_counters().read_chars\n"
        "source = Hub(name=sys.argv[1], max_examples=2)\n"
        "assert len(list(source.texts())) == 2\n"
        "source.describe()\n"
        "print(psutil.Process().io_counters().read_chars - before, flush=True)\n"
        "import os; os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", check, str(folder)], capture_output=True, text=True, check=True)
    # The beginning of a file, three times: for its columns, its ids and its texts.
    assert size > 140_000_000 and int(done.stdout.split()[-1]) < size / 2
