"""A hub of this machine: the endpoints by which datasets are made, listed, read by ranges and committed to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch
from urllib.parse import unquote


@dataclass
class Hub:
    """What it holds: files by path, once the dataset is made; and how it was asked."""

    address: str = ""
    files: dict[str, bytes] | None = None
    large: dict[str, bytes] = field(default_factory=dict)
    private: bool | None = None
    commits: list[list[str]] = field(default_factory=list)
    ranges: list[int] = field(default_factory=list)
    token: str = "hf_good"
    down: bool = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        files = self.hub.files
        if self.hub.down:
            return self.answer({"error": "Service unavailable"}, 503)
        if files is None or not path.removeprefix("/api").startswith("/datasets/some/one"):
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if found := re.fullmatch(r"/api/datasets/some/one/tree/main(?:/(.*))?", path):
            below = f"{found[1]}/" if found[1] else ""
            listed = [self.told(name) for name in files if name.startswith(below)]
            folders = {name[: place.start()] for name in files for place in re.finditer("/", name)}
            inside = [name for name in folders if name.startswith(below)]
            return self.answer([*listed, *({"type": "directory", "path": name, "oid": "d"} for name in inside)])
        if path.startswith("/datasets/some/one/resolve/main/"):
            return self.content(path.removeprefix("/datasets/some/one/resolve/main/"))
        return self.answer({"id": "some/one", "sha": "b" * 40, "siblings": [{"rfilename": name} for name in files]})

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        path, body = unquote(self.path), self.body()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}" and "/paths-info/" not in path:
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.hub.files, self.hub.private = {}, asked.get("private") or asked.get("visibility") == "private"
            return self.answer({"url": f"{self.hub.address}/datasets/some/one"})
        if "/preupload/" in path:
            modes = [
                ("lfs" if file["path"].endswith("parquet") else "regular", file) for file in json.loads(body)["files"]
            ]
            files = [{"path": file["path"], "uploadMode": mode, "shouldIgnore": False} for mode, file in modes]
            return self.answer({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self.wanted(**one) for one in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/paths-info/" in path:
            wanted = json.loads(body)["paths"]
            return self.answer([self.told(name) for name in wanted if name in (self.hub.files or {})])
        if "/commit/" in path:
            return self.commit([json.loads(line) for line in body.splitlines()])
        return self.answer({"error": f"no {path}"}, 404)

    def wanted(self, oid: str, size: int) -> dict:
        upload = {"upload": {"href": f"{self.hub.address}/lfs/{oid}"}}
        return {"oid": oid, "size": size, **({} if oid in self.hub.large else {"actions": upload})}

    def commit(self, lines: list[dict]) -> None:
        files = self.hub.files
        assert files is not None
        self.hub.commits.append([line["value"]["path"] for line in lines if line["key"] != "header"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.hub.address}/datasets/some/one/commit/{'a' * 40}"
        self.answer({"success": True, "commitOid": "a" * 40, "commitUrl": url})

    def told(self, name: str) -> dict:
        content = (self.hub.files or {})[name]
        oid = hashlib.sha256(content).hexdigest()
        lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 1}} if name.endswith("parquet") else {}
        return {"type": "file", "path": name, "oid": oid[:40], "size": len(content), **lfs}

    def content(self, name: str) -> None:
        content = (self.hub.files or {}).get(name)
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            content = content[int(asked[1]) : int(asked[2]) + 1]
            self.hub.ranges.append(len(content))
        self.answer(content, 206 if asked else 200)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, said in {
            "Content-Type": "application/json",
            "Content-Length": str(len(text)),
            **(headers or {}),
        }.items():
            self.send_header(name, said)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


PLACE = "/{repo_id}/resolve/{revision}/{filename}"


@contextmanager
def hub_here() -> Iterator[Hub]:
    """A hub that huggingface_hub is set up for."""
    from huggingface_hub import HfFileSystem, constants

    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"hub": hub})) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        HfFileSystem.clear_instance_cache()
        with (
            patch.object(constants, "ENDPOINT", hub.address),
            patch.object(constants, "HF_HUB_OFFLINE", False),
            patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + PLACE),
            patch.object(constants, "HF_HUB_DISABLE_XET", True),
            patch.dict("os.environ", {"HF_TOKEN": "hf_good"}),
        ):
            yield hub
        HfFileSystem.clear_instance_cache()
        server.shutdown()
