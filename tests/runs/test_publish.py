"""What is published explains itself, loads, tells no local path, and arrives at the hub byte for byte."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs import publish as publish_module
from sniffer.runs.card import card, config_name
from sniffer.runs.export import export
from sniffer.runs.private import without_paths
from sniffer.runs.publish import assemble
from sniffer.runs.verify import verify
from sniffer.storage.manifest import Manifest
from tests.helpers_storage import make_run
from tests.helpers_store import repeat


@dataclass
class Hub:
    """A hub that accepts one token, and keeps what is committed to it."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    created: list[dict] = field(default_factory=list)
    head: str = "b" * 40
    commits: int = 0
    busy: bool = False


@pytest.fixture
def hub() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            if self.path.split("?")[0] == "/api/datasets/some/one" and hub.created:
                siblings = [{"rfilename": name} for name in hub.files]
                self.answer({"id": "some/one", "sha": hub.head, "siblings": siblings})
                hub.head = "c" * 40 if hub.busy else hub.head
            else:
                self.answer({"error": "nothing here"}, 404)

        def do_POST(self) -> None:
            body = self.body()
            if self.headers.get("Authorization") != "Bearer hf_good":
                self.answer({"error": "who are you?"}, 401)
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self.answer({"url": f"{hub.address}/datasets/some/one"})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif self.path == "/api/datasets/some/one/preupload/main":
                files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                self.answer({"files": [{k: f[k] for k in ("path", "uploadMode", "shouldIgnore")} for f in files]})
            elif self.path == "/api/datasets/some/one/commit/main":
                hub.commits += 1
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del hub.files[line["value"]["path"]]
                    elif line["key"] == "header" and line["value"].get("parentCommit") not in (None, hub.head):
                        return self.answer({"error": "somebody was faster"}, 412)
                url = f"{hub.address}/datasets/some/one/commit/{'a' * 40}"
                self.answer({"success": True, "commitOid": "a" * 40, "commitUrl": url})
            else:
                self.answer({"error": f"no {self.path}"}, 404)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def answer(self, value: object, status: int = 200) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", parts=2).folder
    manifest = Manifest.load(folder)
    secret = {"dataset": {"_target_": "sniffer.tables.JsonLines", "path": "/home/someone/secret/texts.jsonl"}}
    replace(manifest, model={"checkpoint": "/home/someone/models/mine"}, **secret, config=secret).save(folder)
    return folder


def publish(address: str, token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "sniffer.runs", "publish", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_card_tells_the_law_of_our_own_samplers_only(folder: Path):
    """Someone else's class may have the name of one of ours."""
    manifest = Manifest.load(folder)
    theirs = replace(manifest, sampler={**manifest.sampler, "_target_": "mine.LogUniform"})
    assert "floor(log2(p + 1))" in card(manifest, "some/one", None)
    assert "floor(log2(p + 1))" not in card(theirs, "some/one", None)
    assert "that of mine.LogUniform" in card(theirs, "some/one", None)


def test_a_dry_run_is_a_run_folder_with_a_card(folder: Path, tmp_path: Path):
    target = tmp_path / "published"
    assemble(folder, target, "some/one", "cc-by-4.0")
    original, published = open_run(folder), open_run(target)
    assert isinstance(original, Run) and isinstance(published, Run)
    assert published.scan().collect().equals(original.scan().collect())
    assert verify(target)[1] == []
    text = (target / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc-by-4.0"
    assert {config["config_name"] for config in head["configs"]} == {
        config_name(layer, kind) for layer in (0, 2) for kind in ("q", "k")
    }
    for config in head["configs"]:
        assert len(list(target.glob(config["data_files"][0]["path"]))) == 2
    for told in (
        "numbers that are not finite | of ",
        "base_rate 4.0",
        "floor(log2(p + 1))",
        "mine",
        "cc-by-4.0",
        'load_dataset("some/one"',
        "digest",
    ):
        assert told in text


def test_no_local_path_is_told(folder: Path, tmp_path: Path):
    target = tmp_path / "published"
    assemble(folder, target, "some/one")
    for file in target.rglob("*"):
        if file.is_file():
            assert b"someone" not in file.read_bytes(), file
    assert without_paths({"a": ["C:\\Users\\me\\x", "hub/name", 3]}) == {"a": ["x", "hub/name", 3]}


SECRETS = (
    "/home/someone/secret/texts.jsonl",
    "~someone/texts",
    "file:///home/someone/a b.txt",
    "https://someone:token@example.org/data",
    "C:\\Users\\someone\\x",
    "reads (/home/someone/x), then '/home/someone/y'",
)


@pytest.mark.parametrize("secret", SECRETS)
def test_no_local_path_is_told_wherever_it_stands(folder: Path, tmp_path: Path, secret: str):
    manifest = Manifest.load(folder)
    resume = {
        "at": manifest.created,
        "stopped_by": f"DatasetError: {secret} is gone",
        "examples": 2,
        "differences": [f"config.dataset.path: {secret} then, absent now"],
    }
    config = {"dataset": {"path": secret, "globs": [secret]}, "engine": {"name": "ray", "address": "someone.lan:6379"}}
    everywhere = {name: {"x": secret, secret: 1} for name in ("model", "dataset", "device", "backbone")}
    replace(manifest, reason=secret, resumes=(resume,), config=config, **everywhere).save(folder)
    assemble(folder, tmp_path / "published", "some/one")
    for file in (tmp_path / "published").rglob("*"):
        assert not file.is_file() or b"someone" not in file.read_bytes(), file
    shown = Manifest.load(tmp_path / "published")
    assert shown.resumes[0] == resume | {"stopped_by": "DatasetError", "differences": ["config.dataset.path"]}
    assert verify(tmp_path / "published")[1] == []


def test_what_names_no_local_path_stays():
    for text in (
        "owner/name",
        "a / b",
        "1/2",
        "hf://datasets/owner/name",
        "https://x.org/a/b",
        "models.backbone.Checkpoint",
    ):
        assert without_paths(text) == text


def test_a_path_that_is_known_and_would_be_told_is_refused(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sniffer.runs.private.PLACE", re.compile("(?!)"))
    manifest = Manifest.load(folder)
    replace(manifest, backbone={"note": f"of {folder.parent}/weights"}).save(folder)
    with pytest.raises(RunError, match="would tell the local path"):
        assemble(folder, tmp_path / "published", "some/one")


def test_only_whole_runs_are_published(folder: Path, tmp_path: Path):
    part = folder / Manifest.load(folder).parts[0].path
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="SHA-256"):
        assemble(folder, tmp_path / "one", "some/one")
    replace(Manifest.load(folder), status="interrupted").save(folder)
    with pytest.raises(RunError, match="resume"):
        assemble(folder, tmp_path / "two", "some/one")


def test_rows_that_are_there_twice_are_not_handed_on(folder: Path, tmp_path: Path):
    repeat(folder, 0)
    told = r"part-0000\d\.parquet has rows that .* has too: .*resume"
    with pytest.raises(RunError, match=told):
        assemble(folder, tmp_path / "published", "some/one")
    with pytest.raises(RunError, match=told):
        export(folder, tmp_path / "heads")


def test_what_cannot_be_published_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    for target in (tmp_path / "a" / "b", mine):
        with monkeypatch.context() as broken:
            broken.setattr(publish_module, "card", lambda *_: {}[0])
            with pytest.raises(KeyError):
                assemble(folder, target, "some/one")
    assert sorted(tmp_path.iterdir()) == [mine, folder] and not list(mine.iterdir())
    assemble(folder, tmp_path / "a" / "b", "some/one")
    with pytest.raises(RunError, match="holds something already"):
        assemble(folder, tmp_path / "a" / "b", "some/one")
    assert verify(tmp_path / "a" / "b")[1] == []


def test_load_dataset_reads_it(folder: Path, tmp_path: Path):
    target = tmp_path / "published"
    assemble(folder, target, "some/one")
    from datasets import load_dataset

    rows = load_dataset(str(target), config_name(2, "k"), split="train", cache_dir=str(tmp_path / "cache"))
    run = open_run(folder)
    assert isinstance(run, Run)
    assert len(rows) == len(run.scan([2], ["k"]).collect())
    assert len(rows[0]["vector"]) == 8


def test_what_is_pushed_arrives(folder: Path, tmp_path: Path, hub: Hub):
    assemble(folder, tmp_path / "published", "some/one")
    done = publish(hub.address, "hf_good", str(folder), "some/one", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/datasets/some/one"
    assert hub.created[0]["type"] == "dataset" and hub.created[0].get("visibility", "private") == "private"
    wanted = {
        file.relative_to(tmp_path / "published").as_posix(): file.read_bytes()
        for file in (tmp_path / "published").rglob("*")
        if file.is_file()
    }
    assert hub.files.keys() == wanted.keys()
    assert all(hub.files[name] == content for name, content in wanted.items() if not name.endswith("manifest.json"))
    assert not list(folder.parent.glob(".publishing-*"))


def test_a_run_that_is_published_again_replaces_the_earlier_one(folder: Path, tmp_path: Path, hub: Hub):
    """In one commit: whoever reads finds one run or the other, never rows of both."""
    owners = {"notes.md": b"mine", "captures/notes.md": b"mine", "captures/layer=00/kind=q/mine.parquet": b"mine"}
    hub.files |= owners | {".gitattributes": b"hub"}
    assert publish(hub.address, "hf_good", str(folder), "some/one").returncode == 0
    smaller = make_run(tmp_path / "smaller", layers=(2,), kinds=("k", "v")).folder
    done = publish(hub.address, "hf_good", str(smaller), "some/one")
    assert done.returncode == 0 and hub.commits == 2, done.stderr
    for name, content in hub.files.items():
        (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "snapshot" / name).write_bytes(content)
    kept = {name: content for name, content in hub.files.items() if name in (*owners, ".gitattributes")}
    assert kept == owners | {".gitattributes": b"hub"}
    snapshot = open_run(tmp_path / "snapshot")
    assert snapshot.manifest.digest == open_run(smaller).manifest.digest
    parts = {part.path for part in snapshot.manifest.parts}
    assert {name for name in hub.files if "/part-" in name} == parts


def test_two_who_publish_at_once_do_not_mix(folder: Path, hub: Hub):
    hub.files["theirs"], hub.busy = b"", True
    done = publish(hub.address, "hf_good", str(folder), "some/one")
    assert done.returncode == 1 and "publish it again" in done.stderr and len(done.stderr.splitlines()) == 1
    assert hub.files == {"theirs": b""}


@pytest.mark.parametrize(
    ("token", "repo", "told"), [("hf_bad", "some/one", "401"), ("hf_good", "not a name", "owner/name")]
)
def test_a_refusal_is_one_line(folder: Path, hub: Hub, token: str, repo: str, told: str):
    done = publish(hub.address, token, str(folder), repo)
    assert done.returncode == 1 and told in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not hub.files


def test_no_hub_is_one_line(folder: Path):
    done = publish("http://127.0.0.1:9", "hf_good", str(folder), "some/one")
    assert done.returncode == 1 and "--dry-run" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
