"""Folders at URLs: in memory, with what is fetched of each file noted, and on a real S3 server of this machine."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


@contextmanager
def s3() -> Iterator[str]:
    """A real S3 server on this machine, for who asks AWS's own packages; its address."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    S3FileSystem.clear_instance_cache()
    with patch.dict(os.environ, {**keys, "AWS_ENDPOINT_URL": address}):
        fsspec.filesystem("s3").mkdir("bucket")
        yield address
    S3FileSystem.clear_instance_cache()
    server.stop()
