from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sniffer.errors import CaptureError, RunError
from sniffer.process.environment import commit, versions
from sniffer.storage import durable
from sniffer.storage.manifest import Manifest
from tests.helpers_storage import make_manifest, make_run


def edit(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    text = json.loads(path.read_text()) | values
    text.pop("checksum", None)
    path.write_text(json.dumps(text))


def refusal(folder: Path) -> str:
    with pytest.raises(RunError) as caught:
        Manifest.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", parts=2).folder


def test_round_trip(folder: Path):
    manifest = Manifest.load(folder)
    manifest.save(folder)
    assert Manifest.load(folder) == manifest
    assert manifest.layer(2).heads["k"] == 2
    assert manifest.selection[2]["q"] == (0, 1, 2, 3)


def test_before_the_first_commit(tmp_path: Path):
    manifest = make_manifest()
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert (manifest.rows, manifest.rows_by_kind, manifest.rows_by_bucket) == (0, {}, {})


def test_what_follows_from_the_parts_is_written_out(folder: Path):
    manifest = Manifest.load(folder)
    text = json.loads((folder / "manifest.json").read_text())
    assert text["rows"]["total"] == sum(text["rows"]["by_kind"].values()) == manifest.rows > 0
    assert sum(text["rows"]["by_bucket"].values()) == manifest.rows
    assert text["digest"] == manifest.digest
    assert text["digests"]["2"]["k"] == manifest.digests[2]["k"]
    assert manifest.bytes == sum(file.stat().st_size for file in folder.glob("captures/**/*.parquet"))


def test_digests_do_not_depend_on_parts(tmp_path: Path):
    one, three = (Manifest.load(make_run(tmp_path / str(n), parts=n).folder) for n in (1, 3))
    assert (one.digest, one.digests) == (three.digest, three.digests)
    assert len(three.parts) == 3 * len(one.parts)


def test_kinds_without_rows_are_counted(tmp_path: Path):
    part = replace(Manifest.load(make_run(tmp_path).folder).parts[0], rows=0, buckets={})
    assert replace(make_manifest(), parts=(part,)).rows_by_kind == {"q": 0}


def test_a_value_that_json_does_not_know_is_no_reason_to_lose_the_run(tmp_path: Path):
    replace(make_manifest(), model={"path": Path("weights")}).save(tmp_path)
    assert Manifest.load(tmp_path).model == {"path": "weights"}


def test_no_run_folder(tmp_path: Path):
    assert "not a run folder" in refusal(tmp_path)
    assert "not a run folder" in refusal(tmp_path / "missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": "1"}', "\x00"])
def test_broken_json(folder: Path, text: str):
    (folder / "manifest.json").write_text(text)
    assert "broken" in refusal(folder)


@pytest.mark.parametrize("key", ["status", "parts", "geometry", "selection", "examples", "seed", "sampler"])
def test_a_lacking_key(folder: Path, key: str):
    text = json.loads((folder / "manifest.json").read_text())
    del text[key], text["checksum"]
    (folder / "manifest.json").write_text(json.dumps(text))
    assert key in refusal(folder)


PART = {
    "path": "captures/layer=00/kind=q/part-00000.parquet",
    "rows": 1,
    "bytes": 1,
    "sha256": "",
    "layer": 0,
    "kind": "q",
    "digest": "0" * 32,
    "buckets": {"7": 1},
    "commit": 0,
}


@pytest.mark.parametrize(
    "values",
    [
        {"status": "done"},
        {"parts": 3},
        {"parts": [{}]},
        {"parts": ["x"]},
        {"selection": []},
        {"geometry": [1]},
        {"geometry": []},
        {"model": None},
        {"seed": "0"},
        {"created": "yesterday"},
        {"counts": {"examples": "many"}},
        {"timings": {"load": None}},
        {"selection": {"0": {"../q": [0]}}},
        {"selection": {"0": {"q": [None]}}},
        {"sampler": {"probability_by_bucket": {"7": "x"}}},
        {"dataset": {"shard": None}},
        {"parts": [{**PART, "rows": "1"}]},
        {"parts": [{**PART, "layer": 7}]},
        {"parts": [{**PART, "path": "captures/mine"}]},
        {"parts": [{**PART, "path": None}]},
    ],
)
def test_a_wrong_value(folder: Path, values: dict[str, Any]):
    edit(folder, **values)
    assert "broken" in refusal(folder)


def test_a_newer_schema_says_what_to_install(folder: Path):
    edit(folder, schema_version=99)
    assert "install a newer" in refusal(folder)


def test_keys_of_a_later_release_are_left_out(folder: Path):
    manifest = Manifest.load(folder)
    edit(folder, novelty=1)
    assert Manifest.load(folder) == manifest


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../other/part.parquet",
        "captures/../../x",
        "C:\\x",
        "\\\\host\\x",
        "captures\\..\\..\\x",
        "",
    ],
)
@pytest.mark.parametrize("where", ["part", "examples"])
def test_paths_cannot_leave_the_folder(folder: Path, path: str, where: str):
    text = json.loads((folder / "manifest.json").read_text())
    del text["checksum"]
    (text["parts"][1] if where == "part" else text["examples"])["path"] = path
    (folder / "manifest.json").write_text(json.dumps(text))
    assert "outside the run folder" in refusal(folder)


def test_a_missing_part_is_named_unless_asked_not_to(folder: Path):
    path = Manifest.load(folder).parts[1].path
    (folder / path).unlink()
    assert path in refusal(folder)
    assert len(Manifest.load(folder, parts_must_exist=False).parts) > 1


def test_a_failed_save_keeps_the_old_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = Manifest.load(folder)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(durable.os, "fsync", fail)
    with pytest.raises(CaptureError, match="Input/output"):
        replace(manifest, status="interrupted").save(folder)
    assert Manifest.load(folder) == manifest
    assert not list(folder.glob(".*.tmp"))


def test_versions_and_commit():
    found = versions()
    assert found["python"].startswith("3.")
    assert {"torch", "transformers", "numpy", "pyarrow", "polars", "hydra-core"} <= found.keys()
    assert commit() is None or len(commit().split("-")[0]) == 40
