"""Tables give the same documents in every format, and name the place where they cannot."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from sniffer.dataset.hub import Hub, hub_commit
from sniffer.dataset.source import Shard
from sniffer.dataset.tables import Csv, JsonLines, Parquet
from sniffer.errors import DatasetError
from sniffer.hashing import stable_id

Row = dict[str, Any]
ROWS: list[Row] = [
    {"id": "x", "text": 'one, "two"\nthree', "n": 1},
    {"id": "007", "text": "", "n": 2},
    {"id": "ü", "text": "naïve 東京", "n": 3},
]


def write_jsonl(file: Path, rows: list[Row]) -> None:
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")


def write_csv(file: Path, rows: list[Row]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), file)


FORMATS = {
    "jsonl": (JsonLines, write_jsonl),
    "csv": (Csv, write_csv),
    "parquet": (Parquet, write_parquet),
}


@pytest.fixture(params=FORMATS)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Any]:
    """Writes rows in one of the formats, over several files, and returns the dataset over them."""
    made, write = FORMATS[request.param]

    def create(*files: list[Row], **keys: Any) -> Any:
        for number, rows in enumerate(files):
            write(tmp_path / f"{number}.{request.param}", rows)
        return made(path=str(tmp_path), **keys)

    return create


def test_rows_come_back_exactly_in_every_format(table: Callable[..., Any]) -> None:
    expected = [(stable_id(row["id"]), row["id"], row["text"]) for row in ROWS]
    source = table(ROWS, id_column="id")
    assert list(source.texts()) == expected
    assert len(source) == 3


def test_without_an_id_column_rows_are_numbered_over_all_files(table: Callable[..., Any]) -> None:
    rows = list(table(ROWS[:2], ROWS[2:]).texts())
    assert rows == [(number, str(number), row["text"]) for number, row in enumerate(ROWS)]


def test_integer_ids_are_kept(table: Callable[..., Any]) -> None:
    rows = list(table([{"id": 5, "text": "a"}, {"id": 0, "text": "b"}], id_column="id").texts())
    assert rows == [(5, "5", "a"), (0, "0", "b")]


def test_a_shard_has_the_ids_of_the_whole(table: Callable[..., Any]) -> None:
    whole = list(table(ROWS, ROWS).texts())
    assert list(table(ROWS, ROWS, shard=Shard(1, 2), max_examples=5).texts()) == whole[1:5:2]


def test_numbers_beyond_the_rows_are_no_limit(table: Callable[..., Any]) -> None:
    whole = list(table(ROWS).texts())
    for most in (3, 2**63, 10**400):
        assert list(table(ROWS, max_examples=most).texts()) == whole
    for count in (3, 2**63, 10**400):
        assert [list(table(ROWS, shard=Shard(n, count)).texts()) for n in range(3)] == [[row] for row in whole]
        assert list(table(ROWS, shard=Shard(count - 1, count)).texts()) == (whole[2:] if count == 3 else [])


def test_a_missing_column_names_those_that_exist(table: Callable[..., Any]) -> None:
    for keys in ({"text_column": "body"}, {"id_column": "key"}):
        with pytest.raises(DatasetError, match=f"no column '{next(iter(keys.values()))}', only id, text, n"):
            table(ROWS, **keys).check()


def test_a_missing_column_in_a_later_file_is_found(table: Callable[..., Any]) -> None:
    with pytest.raises(DatasetError, match="no column 'text', only other"):
        table(ROWS, [{"other": "x"}]).check()


def test_duplicate_ids_over_files_are_refused(table: Callable[..., Any]) -> None:
    with pytest.raises(DatasetError, match="rows 0 and 3 .* 'x'"):
        table(ROWS, ROWS[:1], id_column="id").check()


def test_a_text_that_is_null_is_named_by_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}])
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(DatasetError, match="row 1 .* has null"):
        JsonLines(path=str(tmp_path)).check()
    with pytest.raises(DatasetError, match="row 1 .* has null"):
        list(Parquet(path=str(tmp_path)).texts())


def test_a_column_that_is_not_text_is_refused_before_reading(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    with pytest.raises(DatasetError, match="'n' is of type int64, not text"):
        Parquet(path=str(tmp_path), text_column="n").check()
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DatasetError, match="row 0 .* has a int"):
        JsonLines(path=str(tmp_path), text_column="n").check()


def test_csv_ids_that_are_plain_whole_numbers_are_integers(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"id": written, "text": ""} for written in ("7", "007", "0", "-7", "7.0")])
    ids = {source_id: number for number, source_id, _ in Csv(path=str(tmp_path), id_column="id").texts()}
    assert ids == {"7": 7, "0": 0, **{written: stable_id(written) for written in ("007", "-7", "7.0")}}


def test_a_string_id_in_a_typed_format_stays_a_string(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"id": "7", "text": ""}])
    assert [row[0] for row in Parquet(path=str(tmp_path), id_column="id").texts()] == [stable_id("7")]


@pytest.mark.parametrize(
    ("line", "problem"), [("{", "not JSON"), ("[1]", "JSON list"), ('"x"', "JSON str"), ("[" * 99999, "not JSON")]
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n' + line + "\n")
    with pytest.raises(DatasetError, match=f"a.jsonl line 3 .*{problem}"):
        JsonLines(path=str(tmp_path)).check()


def test_gzipped_lines_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write('{"text": "ü"}\n')
    assert [text for *_, text in JsonLines(path=str(tmp_path)).texts()] == ["ü"]


def test_gzipped_lines_that_are_damaged_are_the_same_lines_or_refused_in_one(tmp_path: Path) -> None:
    """By gzip's check sum, or by what it unpacks them with, which says so in another way."""
    rows = [{"text": f"{n} times {n} is {n * n}"} for n in range(300)]
    whole = gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode(), mtime=0)
    file, refused = tmp_path / "a.jsonl.gz", 0
    flipped = [bytes([*whole[:at], whole[at] ^ 16, *whole[at + 1 :]]) for at in range(12, len(whole), 29)]
    for damaged in (*flipped, whole[:6], whole[: len(whole) // 2], whole[:-1], whole + b"more"):
        file.write_bytes(damaged)
        try:
            assert [text for *_, text in JsonLines(path=str(file)).texts()] == [row["text"] for row in rows]
        except DatasetError as error:
            assert "a.jsonl.gz" in str(error) and len(str(error).splitlines()) == 1
            refused += 1
    assert refused > len(flipped)


@pytest.mark.parametrize("column", ["text", "id"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, column: str) -> None:
    """Which of them is meant nobody knows; columns that are not asked for may be there as often as they like."""
    names = [column, "id", "text", "n", "n"]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n1,2,3,4,5\n")
    (tmp_path / "a.jsonl").write_text("{" + ", ".join(f'"{name}": "{n}"' for n, name in enumerate(names)) + "}\n")
    pq.write_table(pa.Table.from_arrays([pa.array([f"{n}"]) for n in range(5)], names=names), tmp_path / "a.parquet")
    for made in (Csv, JsonLines, Parquet):
        with pytest.raises(DatasetError, match=f"has 2 columns '{column}'"):
            made(path=str(tmp_path), id_column="id").check()
        assert made(path=str(tmp_path), text_column="id" if column == "text" else "text")._ids == [0]


@pytest.mark.parametrize(("made", "name"), [(Parquet, "a.parquet"), (JsonLines, "a.jsonl"), (JsonLines, "a.jsonl.gz")])
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, made: Any, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00\xff\xfe not this")
    with pytest.raises(DatasetError, match=name) as caught:
        made(path=str(tmp_path)).check()
    assert len(str(caught.value).splitlines()) == 1


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:4] + b"\xff" * 20 + content[24:])
    with pytest.raises(DatasetError, match=r"a\.parquet cannot be read as Parquet"):
        list(Parquet(path=str(tmp_path)).texts())


def test_a_parquet_file_is_refused_in_one_line_wherever_it_is_damaged(tmp_path: Path) -> None:
    """Texts that are no text any more, and rows that are no longer there, come as errors of Python's own."""
    write_parquet(tmp_path / "whole.parquet", [{"text": "a"}, {"text": "b"}])
    whole, file = (tmp_path / "whole.parquet").read_bytes(), tmp_path / "a.parquet"
    for at in range(len(whole)):
        file.write_bytes(bytes([*whole[:at], whole[at] ^ 0xFF, *whole[at + 1 :]]))
        with suppress(DatasetError):  # of a header nobody needs, or a letter, no reader can know
            list(Parquet(path=str(file)).texts())


def test_a_table_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    source = JsonLines(path=str(tmp_path))
    source.check()
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    with pytest.raises(DatasetError, match="ends before row 2"):
        list(source.texts())


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` loads as it would a repository of the hub, with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repo"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    return folder


def test_a_hub_dataset_gives_the_same_documents(local_hub: Path) -> None:
    source = Hub(name=str(local_hub), id_column="id")
    assert list(source.texts()) == [(stable_id(row["id"]), row["id"], row["text"]) for row in ROWS]
    assert [row[1] for row in Hub(name=str(local_hub), shard=Shard(1, 2)).texts()] == ["1"]


def test_a_hub_dataset_is_checked_by_column(local_hub: Path) -> None:
    with pytest.raises(DatasetError, match="no column 'body', only id, text, n"):
        Hub(name=str(local_hub), text_column="body").check()
    with pytest.raises(DatasetError, match="'n' is of type int64"):
        Hub(name=str(local_hub), text_column="n").check()


def test_the_cause_that_datasets_hides_is_shown(local_hub: Path) -> None:
    with pytest.raises(DatasetError, match="nope"):
        Hub(name=str(local_hub), split="nope").check()


def test_a_local_folder_is_known_by_what_its_files_hold(local_hub: Path) -> None:
    first = Hub(name=str(local_hub)).describe()
    assert first["commit"] is None and first["files"] == 1 and len(first["sha256"]) == 64
    assert Hub(name=str(local_hub)).describe() == first
    write_jsonl(local_hub / "train.jsonl", [{**row, "n": 9} for row in ROWS])
    changed = Hub(name=str(local_hub)).describe()
    assert changed["bytes"] == first["bytes"] and changed["sha256"] != first["sha256"]
    (local_hub / "README.md").write_text("---\npretty_name: mine\n---\n")
    assert Hub(name=str(local_hub)).describe()["files"] == 2


def test_a_cached_copy_is_known_by_its_commit_or_by_what_it_holds(
    local_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline the hub cannot say which commit it is."""
    table = Hub(name=str(local_hub))._table
    monkeypatch.setattr("sniffer.dataset.hub.hub_commit", lambda *_: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: table)
    told = Hub(name="owner/name").facts()
    assert told["commit"] is None and told["files"] == 1 and len(told["sha256"]) == 64
    commit = "0123456789" * 4
    monkeypatch.setattr(type(table), "cache_files", [{"filename": str(tmp_path / commit / "name-train.arrow")}])
    assert Hub(name="owner/name").facts() == {"commit": commit}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError, "gated: accept its terms"),
        (RepositoryNotFoundError, "not on the hub"),
        (ConnectionRefusedError, "no network"),
    ],
)
def test_the_hub_says_why_not(error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(HfApi, "auth_check", refuse)
    with pytest.raises(DatasetError, match=said):
        hub_commit("owner/name", None)
