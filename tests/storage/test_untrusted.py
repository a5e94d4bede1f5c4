"""Small files of someone else are read within bounds: of bytes, depth, memory and time."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sniffer.config.saving import save_plain, saved_config
from sniffer.errors import ConfigError, RunError
from sniffer.limits import TOKENS
from sniffer.reader.index import errors
from sniffer.reader.index_file import read_index
from sniffer.storage.examples import as_read, examples_table
from sniffer.storage.schema import EXAMPLES_SCHEMA
from sniffer.storage.untrusted import CONFIG_BYTES, DEPTH, plain_yaml, read_json, read_text, read_yaml
from tests.helpers_storage import make_run

TEXT = st.text(st.characters(codec="utf-8"))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


@given(PLAIN)
def test_what_is_plain_is_read_as_ever(values):
    text = yaml.safe_dump(values, allow_unicode=True)
    assert plain_yaml(text) == yaml.safe_load(text)


LINES = (f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(LINES)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LAUGHS, "alias"),
        ("a: &a\n  b: *a\n", "alias"),
        ("a: {<<: &a {b: 1}, c: *a}", "alias"),
        ("[" * 300, "levels deep"),
        ("".join(f"{' ' * n}a:\n" for n in range(99)), "levels deep"),
        ("a: 1" + ":1" * 3_000, "a number of"),
        ("a: " + "9" * 3_000, "a number of"),
        ("a: 1" + "_" * 3_000 + ".0", "a number of"),
        ("a: !!python/object/apply:os.system [id]", "the tag"),
        ("a: !!timestamp x", "the tag"),
        ('a: "\\ud800"', "surrogates"),
    ],
    ids=range(11),
)
def test_a_bomb_of_yaml_is_refused_before_it_grows(text: str, named: str):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=named):
            plain_yaml(text)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ['{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "[" * 100 + "]" * 100, '"\\ud800"'])
def test_a_bomb_of_json_is_refused(tmp_path: Path, text: str):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "file")


def test_depth_is_counted(tmp_path: Path):
    for depth, fits in ((DEPTH, True), (DEPTH + 1, False)):
        (tmp_path / "file").write_text("[" * depth + "]" * depth)
        for read in (read_json, read_yaml):
            if fits:
                read(tmp_path / "file")
            else:
                with pytest.raises(ValueError, match="levels deep"):
                    read(tmp_path / "file")


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b" " * (CONFIG_BYTES + 1))
    for name, named in (("fifo", "no plain file"), ("device", "no plain file"), ("large", "more than the")):
        with pytest.raises(ValueError, match=named):
            read_text(tmp_path / name)
        (tmp_path / "config.yaml").unlink(missing_ok=True)
        (tmp_path / name).rename(tmp_path / "config.yaml")
        with pytest.raises(RunError, match=named):
            saved_config(tmp_path)


def test_no_configuration_is_saved_that_could_not_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="characters"):
        save_plain(tmp_path, {"capture": {"heads": list(range(100_000))}})
    save_plain(tmp_path, {"capture": {"heads": list(range(1000))}})
    assert saved_config(tmp_path) == {"capture": {"heads": list(range(1000))}}


def write_examples_of(path: Path, rows: int, **columns: pa.Array) -> None:
    usual = {
        "example_id": pa.array(range(rows), pa.int64()),
        "source_id": pa.array([f"doc-{n}" for n in range(rows)]).dictionary_encode(),
        "n_tokens": pa.array([5] * rows, pa.int32()),
        "truncated": pa.array([False] * rows),
    }
    pq.write_table(pa.table(usual | columns, schema=as_read(EXAMPLES_SCHEMA)), path, compression="zstd")


@pytest.mark.parametrize(
    ("rows", "columns", "named"),
    [
        (3, {"n_tokens": pa.array([5, 2**31 - 1, 5], pa.int32())}, f"to 2,147,483,647 tokens, not 0 to {TOKENS:,}"),
        (3, {"n_tokens": pa.array([5, -1, 5], pa.int32())}, "of -1 to 5 tokens"),
        (3, {"example_id": pa.array([7, 7, 8], pa.int64())}, "the same example_id twice"),
        (99, {"source_id": pa.array(["x" * 99_999 + str(n) for n in range(99)]).dictionary_encode()}, "stand for"),
        (50, {"source_id": pa.DictionaryArray.from_arrays([0] * 50, [os.urandom(20_000).hex()])}, "source_id twice"),
        (
            200_000,
            {
                "example_id": pa.array([1] * 200_000, pa.int64()),
                "source_id": pa.DictionaryArray.from_arrays([0] * 200_000, ["x"]),
            },
            "stand for 200,000 rows",
        ),
    ],
    ids=range(6),
)
def test_documents_that_no_run_can_have_are_refused(tmp_path: Path, rows: int, columns: dict, named: str):
    write_examples_of(tmp_path / "file", rows, **columns)
    with pytest.raises(ValueError, match=named):
        examples_table(tmp_path / "file")


def test_other_columns_are_no_documents(tmp_path: Path):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "file")
    with pytest.raises(ValueError, match="does not have the columns example_id"):
        examples_table(tmp_path / "file")


@pytest.mark.parametrize(
    ("table", "named"),
    [
        (
            pa.table({"path": ["../outside"], "error": [None]}, pa.schema({"path": "str", "error": "str"})),
            "outside the sweep",
        ),
        (pa.table({"path": ["/etc"], "error": ["x"]}), "outside the sweep"),
        (pa.table({"path": [5], "error": ["x"]}), "no column path of text"),
        (pa.table({"path": ["0"]}), "no column error of text"),
    ],
    ids=range(4),
)
def test_an_index_that_no_sweep_can_have_is_refused(tmp_path: Path, table: pa.Table, named: str):
    pq.write_table(table, tmp_path / "sweep.parquet")
    with pytest.raises(RunError, match=named):
        errors(tmp_path)


def test_an_index_of_long_errors_takes_no_more_memory_than_they_do(tmp_path: Path):
    rows, text = 20_000, os.urandom(50_000).hex()
    told = pa.DictionaryArray.from_arrays([0] * rows, [text])
    pq.write_table(pa.table({"path": [str(n) for n in range(rows)], "error": told}), tmp_path / "index")
    found = read_index(tmp_path / "index")
    assert len(found) == rows and len({id(error) for error in found.values()}) == 1


def test_a_manifest_that_is_no_file_is_one_line(tmp_path: Path):
    folder = make_run(tmp_path / "run").folder
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    from sniffer.storage.manifest import Manifest

    with pytest.raises(RunError, match="no plain file"):
        Manifest.load(folder)
    assert Manifest.recover(folder)[0].rows
    assert json.loads((folder / ".manifest.json").read_text())
