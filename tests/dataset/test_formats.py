"""The same documents come from every format, packing and nesting; what cannot be read is named, or left out."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sniffer.dataset.files import TextFiles
from sniffer.dataset.hub import Hub
from sniffer.dataset.tables import Csv, Json, JsonLines, Parquet
from sniffer.errors import ConfigError, DatasetError

TEXTS = ["one, two\tthree", 'a "quoted"; naïve 東京', "last"]
PACKS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: zstd(content),
}


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def as_csv(separator: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator)
    writer.writerows([["id", "text"], *(["7", text] for text in TEXTS)])
    return stream.getvalue().encode()


FORMATS: dict[str, tuple[Any, bytes, dict[str, Any]]] = {
    ".jsonl": (JsonLines, "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(), {}),
    ".json": (Json, json.dumps([{"text": text} for text in TEXTS]).encode(), {}),
    ".csv": (Csv, as_csv(","), {}),
    ".tsv": (Csv, as_csv("\t"), {}),
    ".semicolons.csv": (Csv, as_csv(";"), {"separator": ";"}),
}


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", ["", "*", "data{}"])
def test_every_format_and_packing_gives_the_same_documents(tmp_path: Path, name: str, pack: str, place: str):
    made, content, keys = FORMATS[name]
    (tmp_path / f"data{name}{pack}").write_bytes(PACKS[pack](content))
    rows = made(path=str(tmp_path / place.format(f"{name}{pack}")), **keys).texts()
    assert list(rows) == [(row, str(row), text) for row, text in enumerate(TEXTS)]


@pytest.mark.parametrize("pack", PACKS)
def test_texts_are_read_packed_or_not(tmp_path: Path, pack: str):
    content = "\ufeffa\r\nb ü\n"
    (tmp_path / f"a.txt{pack}").write_bytes(PACKS[pack](content.encode()))
    assert [row[1:] for row in TextFiles(path=str(tmp_path)).texts()] == [(f"a.txt{pack}", content[1:])]


@pytest.mark.parametrize("pack", [".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_file_that_is_cut_short_is_named(tmp_path: Path, name: str, pack: str):
    """Some readers take it for whole, or for empty."""
    made, content, keys = FORMATS[name]
    whole = PACKS[pack](content)
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole + b"more", content):
        (tmp_path / f"a{name}{pack}").write_bytes(damaged)
        with pytest.raises(DatasetError, match="skip_unreadable=true") as caught:
            made(path=str(tmp_path), **keys).check()
        assert f"a{name}{pack}" in str(caught.value) and "\n" not in str(caught.value)


NESTED = [
    {"doc": {"body": "a", "id": "x"}, "messages": [{"content": "hi", "role": "user"}, {"content": "yes", "role": "b"}]},
    {"doc": {"body": "b", "id": "y"}, "messages": [{"content": "ho", "role": "user"}]},
]
PATHS = [("doc.body", ["a", "b"]), ("messages.0.content", ["hi", "ho"]), ("messages.-1.content", ["yes", "ho"])]


@pytest.fixture(params=["jsonl", "json", "parquet", "hub"])
def nested(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A nested table in one of the formats: a class, and where the data are."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(NESTED), folder / "a.parquet")
    elif request.param == "json":
        (folder / "a.json").write_text(json.dumps(NESTED))
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NESTED))
    made, where = {"parquet": (Parquet, "path"), "json": (Json, "path"), "hub": (Hub, "name")}.get(
        request.param, (JsonLines, "path")
    )
    return lambda **keys: made(**{where: str(folder)}, **keys)


@pytest.mark.parametrize(("path", "expected"), PATHS)
def test_a_path_leads_into_a_column(nested: Any, path: str, expected: list[str]):
    source = nested(text_column=path, id_column="doc.id")
    source.check()
    assert [row[1:] for row in source.texts()] == list(zip("xy", expected, strict=True))


@pytest.mark.parametrize("path", ["doc.title", "doc.body.more", "messages.content", "messages.5.content", "nope.body"])
def test_a_path_that_leads_nowhere_says_how_far_it_leads(nested: Any, path: str):
    with pytest.raises(DatasetError, match=rf"'{path}' ends at|no column '{path}', only doc, messages"):
        source = nested(text_column=path)
        source.check()
        list(source.texts())


def test_a_column_whose_name_has_dots_comes_first(tmp_path: Path):
    row = {"a.b": "whole", "a": {"b": "nested"}}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("a.b,a\nwhole,other\n")
    for made in (JsonLines, Parquet, Csv):
        assert [text for *_, text in made(path=str(tmp_path), text_column="a.b").texts()] == ["whole"]


def test_cells_of_csv_have_no_inside(tmp_path: Path):
    (tmp_path / "x.csv").write_text("doc,text\na,b\n")
    with pytest.raises(DatasetError, match=r"'doc\.body' ends at 'doc', a str"):
        Csv(path=str(tmp_path), text_column="doc.body").check()


def test_objects_one_per_line_and_an_array_are_told_apart(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(DatasetError, match="dataset=jsonl"):
        Json(path=str(tmp_path)).check()
    (tmp_path / "b.json").write_text('[{"text": "a"}]')
    with pytest.raises(DatasetError, match="dataset=json"):
        JsonLines(path=str(tmp_path / "b.json")).check()
    (tmp_path / "a.json").write_text('[{"text": "a"}, 3]')
    with pytest.raises(DatasetError, match=r"a\.json element 1 holds a JSON int"):
        Json(path=str(tmp_path / "a.json")).check()


@pytest.mark.parametrize("separator", ["", ";;", "\n", '"', "…"])
def test_a_separator_is_one_character(separator: str):
    with pytest.raises(ConfigError, match=r"dataset\.separator"):
        Csv(path="x", separator=separator)


GOOD = {
    TextFiles: ("txt", b"fine"),
    JsonLines: ("jsonl", b'{"text": "fine"}\n'),
    Json: ("json", b'[{"text": "fine"}]'),
    Csv: ("csv", b"text\nfine\n"),
}


@pytest.mark.parametrize("made", [*GOOD, Parquet])
def test_a_file_that_cannot_be_read_is_refused_or_left_out_and_counted(tmp_path: Path, made: Any, caplog: Any):
    """Also one whose first rows are whole: they do not count."""
    ending, good = GOOD.get(made, ("parquet", b""))
    if made is Parquet:
        pq.write_table(pa.table({"text": ["fine"]}), tmp_path / "b.parquet")
    else:
        (tmp_path / f"b.{ending}").write_bytes(good)
    (tmp_path / f"a.{ending}").write_bytes(good + good[:-3] + b"\xff\xfe")
    with pytest.raises(DatasetError, match=rf"a\.{ending} .*dataset\.skip_unreadable=true"):
        list(made(path=str(tmp_path)).texts())
    source = made(path=str(tmp_path), skip_unreadable=True)
    assert [text for *_, text in source.texts()] == ["fine"]
    described = source.describe()
    assert (described["unreadable"], described["files"], described["documents"]) == (1, 1, 1)
    assert "1 of 2 files are left out" in caplog.text and f"a.{ending}" in caplog.text


def test_all_files_unreadable_is_still_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(DatasetError, match="is empty"):
        JsonLines(path=str(tmp_path), skip_unreadable=True).check()


def test_a_dataset_is_described_as_early_releases_did_where_new_keys_say_nothing(tmp_path: Path):
    """Else no run of theirs could be resumed."""
    (tmp_path / "a.csv").write_text("text\na\n")
    described = Csv(path=str(tmp_path)).describe()
    early = ("_target_", "path", "text_column", "id_column", "max_examples", "max_tokens", "shard")
    assert set(described) == {*early, "documents", "files", "bytes", "sha256"}
    assert Csv(path=str(tmp_path), separator=";").describe()["separator"] == ";"
