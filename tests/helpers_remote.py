"""Folders at URLs: in memory, with what is fetched of each file noted, and on a real S3 server of this machine."""

from __future__ import annotations

import io
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


def copy_to(folder: Path, url: str) -> str:
    """All files of a folder, below a URL."""
    system = fsspec.filesystem(url.partition("://")[0])
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            system.pipe(f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return url


def files_at(url: str) -> dict[str, bytes]:
    """What lies below a URL, by path, as the file system itself says."""
    system = fsspec.filesystem(url.partition("://")[0])
    system.invalidate_cache()
    root = system._strip_protocol(url)
    return {name.removeprefix(f"{root}/"): system.cat_file(name) for name in system.find(url)}


@contextmanager
def counting(url: str) -> Iterator[Counter[str]]:
    """Bytes that are fetched of each file below a memory:// URL."""
    honest, fetched = MemoryFileSystem.cat_file, Counter[str]()
    root = MemoryFileSystem._strip_protocol(url)

    def cat_file(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None, **more: object):
        content = honest(self, path, start, end, **more)
        fetched[self._strip_protocol(path).removeprefix(f"{root}/")] += len(content)
        return content

    with patch.object(MemoryFileSystem, "cat_file", cat_file):
        yield fetched


@dataclass
class Server:
    """A real S3 server on this machine, which can be in trouble.

    `trouble` is asked of each request (its method and path): None for none, seconds to wait, CUT for a connection that
    is cut, HALF for a body of which half arrives, REFUSED for a request that is not allowed. `done` has what was asked.
    """

    address: str = ""
    trouble: Callable[[str, str], float | str | None] = lambda method, path: None
    done: list[tuple[str, str]] = field(default_factory=list)
    app: Any = None

    @property
    def environment(self) -> dict[str, str]:
        """For who asks AWS's own packages."""
        keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**keys, "AWS_ENDPOINT_URL": self.address, "AWS_EC2_METADATA_DISABLED": "true"}

    def __call__(self, environ: dict[str, Any], respond: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        trouble = self.trouble(method, path)
        if trouble == CUT:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        if trouble == REFUSED:
            respond("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>you may not</Message></Error>"]
        if trouble == HALF:
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ = {name: value for name, value in environ.items() if "CHECKSUM" not in name}
            environ |= {"wsgi.input": io.BytesIO(body[: len(body) // 2]), "CONTENT_LENGTH": str(len(body) // 2)}
        elif isinstance(trouble, float):
            time.sleep(trouble)
        answer = self.app(environ, respond)
        self.done.append((method, path))
        return answer


CUT, HALF, REFUSED = "cut", "half", "refused"


@contextmanager
def s3() -> Iterator[Server]:
    """A server with a bucket called bucket, for this process too."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from s3fs import S3FileSystem
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = Server(app=DomainDispatcherApplication(create_backend_app))
    listening = make_server("127.0.0.1", 0, server, threaded=True)
    server.address = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    S3FileSystem.clear_instance_cache()
    with patch.dict(os.environ, server.environment):
        with suppress(FileExistsError):  # an earlier server of this process had the same buckets
            fsspec.filesystem("s3").mkdir("bucket")
        yield server
    S3FileSystem.clear_instance_cache()
    listening.shutdown()
