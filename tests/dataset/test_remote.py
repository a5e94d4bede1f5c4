"""Files at a URL are the dataset that they would be on this machine, and what cannot be fetched is told in one line."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest
from fsspec.registry import _registry as fsspec_registry

from sniffer.dataset.files import TextFiles
from sniffer.dataset.source import Source
from sniffer.dataset.tables import Csv, JsonLines, Parquet
from sniffer.errors import DatasetError
from sniffer.runs.private import without_paths
from sniffer.runs.verify import verify
from sniffer.storage.manifest import Manifest
from tests.helpers_runs import Runs
from tests.tiny_run import save_checkpoint

TEXTS = {"one": "the cat sat on the mat. " * 5, "two": "a dog ran over the hill. " * 9, "three": "ends"}


class Serving(SimpleHTTPRequestHandler):
    """The files of a folder; one that is refused, and one that ends before it should."""

    def do_GET(self) -> None:
        if "forbidden" in self.path:
            return self.send_error(403)
        if "short" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "4000")
            self.end_headers()
            self.wfile.write(b'{"text": "begins')
            return None
        return super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import polars as pl

    place = tmp_path_factory.mktemp("served")
    lines = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in TEXTS.items())
    (place / "docs.jsonl").write_text(lines)
    (place / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (place / "bad.jsonl").write_text(lines + "{not json\n")
    frame = pl.DataFrame({"id": list(TEXTS), "text": list(TEXTS.values())})
    frame.write_parquet(place / "docs.parquet")
    frame.write_csv(place / "table.tsv", separator="\t")
    (place / "books").mkdir()
    for name, text in TEXTS.items():
        (place / "books" / f"{name}.txt").write_text(text)
    return place


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Serving, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def known(source: Source) -> tuple[object, ...]:
    """Everything that a run gets to know of a dataset, but where it lies."""
    source.check()
    return list(source.texts()), len(source), source.facts()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (JsonLines, "docs.jsonl"),
        (JsonLines, "packed.jsonl.gz"),
        (Parquet, "docs.parquet"),
        (Csv, "table.tsv"),
        (TextFiles, "books/one.txt"),
        (TextFiles, "books/*.txt"),
    ],
)
def test_a_file_is_the_same_dataset_wherever_it_lies(folder: Path, url: str, kind: type[Source], name: str):
    options = {} if kind is TextFiles else {"id_column": "id"}
    here = known(kind(path=str(folder / name), **options))
    assert known(kind(path=f"{url}/{name}", **options)) == here
    assert known(kind(path=(folder / name).as_uri().replace("%2A", "*"), **options)) == here
    assert len(here[0]) == (1 if name == "books/one.txt" else 3)


def test_a_query_is_no_wildcard_and_no_part_of_the_name(folder: Path, url: str):
    here = known(JsonLines(path=str(folder / "packed.jsonl.gz")))
    assert known(JsonLines(path=f"{url}/packed.jsonl.gz?download=true")) == here


def test_other_file_systems_and_globs_in_folders(folder: Path):
    memory = fsspec.filesystem("memory")
    for file in (folder / "books").iterdir():
        memory.pipe(f"/remote/{file.stem}/part.txt", file.read_bytes())
    (source,) = [TextFiles(path="memory://remote/**/*.txt")]
    assert {name: text for _, name, text in source.texts()} == {
        f"{name}/part.txt": text for name, text in TEXTS.items()
    }
    copies = source.files[0].parents[1]
    assert copies.is_dir()
    del source
    assert not copies.exists()
    with pytest.raises(DatasetError, match=r"memory://remote is a folder: name its files with a glob"):
        TextFiles(path="memory://remote").check()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("{url}/none.jsonl", r"none.jsonl is not there: check the address"),
        ("{url}/none*.jsonl", r"none\*.jsonl no file matches this glob"),
        ("{url}/forbidden.jsonl", r"forbidden.jsonl cannot be fetched \(403"),
        ("{url}/short.jsonl", r"short.jsonl cannot be fetched \(.*: check the address, the network"),
        ("http://127.0.0.1:9/docs.jsonl", r"docs.jsonl cannot be fetched \(.*127.0.0.1', 9\)"),
        (
            "http://no-such-host.invalid/docs.jsonl",
            r"no-such-host.invalid/docs.jsonl cannot be fetched \(.*\): check the address, the network",
        ),
        ("{url}", r"names no file: give one, or a glob"),
        ("{url}/bad.jsonl", r"http://127.0.0.1:[0-9]+/bad.jsonl line 4 is not JSON"),
        ("nowhere://docs.jsonl", r"is not a URL that is read: wanted http://, https://, s3://"),
        ("zip://docs.jsonl::{url}/docs.zip", r"is not a URL that is read"),
        ("https://me:secret@host/docs.jsonl", r"has a password in its URL, which the run would save"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(url: str, place: str, told: str):
    with pytest.raises(DatasetError, match=told) as raised:
        JsonLines(path=place.format(url=url)).check()
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(fsspec_registry, scheme, raising=False)  # where another test has met it
    with pytest.raises(DatasetError, match=rf"needs {package}: pip install 'qk-sniffer\[remote\]'"):
        JsonLines(path=f"{scheme}://bucket/docs.jsonl").check()


def test_what_does_not_fit_the_disk_is_refused(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(DatasetError, match=r"bytes, and .* has 10 free: set TMPDIR"):
        JsonLines(path=f"{url}/docs.jsonl").check()


def test_a_run_over_a_url_has_the_digest_of_the_local_one(folder: Path, url: str, tmp_path: Path):
    save_checkpoint(tmp_path / "checkpoint")
    here, there = (
        Runs(tmp_path / "checkpoint", place, tmp_path).start(name)
        for name, place in (("here", folder / "docs.jsonl"), ("there", f"{url}/docs.jsonl"))
    )
    first, second = Manifest.load(here), Manifest.load(there)
    assert first.digest == second.digest and first.rows > 0 and verify(there)[1] == []
    assert second.dataset == {**first.dataset, "path": f"{url}/docs.jsonl"}
    assert second.config["dataset"]["path"] == f"{url}/docs.jsonl"


def test_a_published_run_tells_no_signature():
    assert without_paths("s3://bucket/docs.jsonl") == "s3://bucket/docs.jsonl"
    assert without_paths("https://host/docs.jsonl?X-Signature=abc") == "https://host/docs.jsonl"


def test_a_folder_on_this_machine_is_still_a_path(tmp_path: Path):
    with pytest.raises(DatasetError, match="no such file or folder"):
        JsonLines(path=str(tmp_path / "none.jsonl")).check()
