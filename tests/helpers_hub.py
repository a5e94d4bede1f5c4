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
    """What it holds, by branch, once the dataset some/one is made; and how it was asked.

    `busy`: somebody else commits whenever it has been asked what there is. `down`: it answers nothing else than that.
    """

    address: str = ""
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    large: dict[str, bytes] = field(default_factory=dict)
    created: list[dict] = field(default_factory=list)
    commits: list[list[str]] = field(default_factory=list)
    ranges: list[int] = field(default_factory=list)
    head: str = "b" * 40
    token: str = "hf_good"
    busy: bool = False
    down: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]

    @property
    def private(self) -> bool:
        (asked,) = self.created
        return bool(asked.get("private") or asked.get("visibility") == "private")


API = "/api/datasets/some/one"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if self.hub.down:
            return self.answer({"error": "Service unavailable"}, 503)
        if not self.hub.created or not path.removeprefix("/api").startswith("/datasets/some/one"):
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if found := re.fullmatch("/datasets/some/one/resolve/([^/]+)/(.*)", path):
            return self.content(self.hub.branches.get(found[1], {}).get(found[2]))
        files = self.hub.branches.get(self.branch(path))
        if files is None:
            return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if found := re.fullmatch(f"{API}/tree/[^/]+(?:/(.*))?", path):
            below = f"{found[1]}/" if found[1] else ""
            listed = [told(name, content) for name, content in files.items() if name.startswith(below)]
            folders = {name[: place.start()] for name in files for place in re.finditer("/", name)}
            inside = [name for name in folders if name.startswith(below)]
            return self.answer([*listed, *({"type": "directory", "path": name, "oid": "d"} for name in inside)])
        self.answer({"id": "some/one", "sha": self.hub.head, "siblings": [{"rfilename": name} for name in files]})
        if self.hub.busy:
            self.hub.head = "c" * 40

    def branch(self, path: str) -> str:
        """That a path of the API names."""
        whole = re.match(f"{API}/(?:revision|commit|branch|paths-info)/(.+)", path)
        found = whole or re.match(f"{API}/tree/([^/]+)", path)
        return found[1] if found else "main"

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        path, body = unquote(self.path), self.body()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}" and "/paths-info/" not in path:
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            return self.answer({"url": f"{self.hub.address}/datasets/some/one"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        files = self.hub.branches.get(branch := self.branch(path))
        if path.startswith(f"{API}/branch/"):
            if files is not None:
                return self.answer({"error": "is there"}, 409)
            self.hub.branches[branch] = dict(self.hub.files)
            return self.answer({})
        if files is None:
            return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if "/preupload/" in path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith("parquet") else "regular" for path in paths}
            each = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self.answer({"files": each})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self.wanted(**one) for one in json.loads(body)["objects"]]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/paths-info/" in path:
            wanted = json.loads(body)["paths"]
            return self.answer([told(name, files[name]) for name in wanted if name in files])
        if "/commit/" in path:
            return self.commit(files, [json.loads(line) for line in body.splitlines()])
        return self.answer({"error": f"no {path}"}, 404)

    def wanted(self, oid: str, size: int) -> dict:
        upload = {"upload": {"href": f"{self.hub.address}/lfs/{oid}"}}
        return {"oid": oid, "size": size, **({} if oid in self.hub.large else {"actions": upload})}

    def commit(self, files: dict[str, bytes], lines: list[dict]) -> None:
        parents = [line["value"].get("parentCommit") for line in lines if line["key"] == "header"]
        if any(parent not in (None, self.hub.head) for parent in parents):
            return self.answer({"error": "somebody was faster"}, 412)
        gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        if not {*gone} <= files.keys():
            return self.answer({"error": "a file to be deleted is not there"}, 400)
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
        return self.answer({"success": True, "commitOid": "a" * 40, "commitUrl": url})

    def content(self, content: bytes | None) -> None:
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            content = content[int(asked[1]) : int(asked[2]) + 1]
            self.hub.ranges.append(len(content))
        return self.answer(content, 206 if asked else 200)

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


def told(name: str, content: bytes) -> dict:
    """What the hub says of a file."""
    oid = hashlib.sha256(content).hexdigest()
    lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 1}} if name.endswith("parquet") else {}
    return {"type": "file", "path": name, "oid": oid[:40], "size": len(content), **lfs}


PLACE = "/{repo_id}/resolve/{revision}/{filename}"


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, for processes that are told of its address."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Handler,), {"hub": hub})) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


@contextmanager
def asked_at(address: str) -> Iterator[None]:
    """Has huggingface_hub take what listens at an address for the hub."""
    from huggingface_hub import HfFileSystem, constants

    HfFileSystem.clear_instance_cache()
    with (
        patch.object(constants, "ENDPOINT", address),
        patch.object(constants, "HF_HUB_OFFLINE", False),
        patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + PLACE),
        patch.object(constants, "HF_HUB_DISABLE_XET", True),
        patch.dict("os.environ", {"HF_TOKEN": "hf_good"}),
    ):
        yield
    HfFileSystem.clear_instance_cache()


@contextmanager
def hub_here() -> Iterator[Hub]:
    """A hub that huggingface_hub is set up for."""
    with serving() as hub, asked_at(hub.address):
        yield hub
