"""Where a mirror writes: files below a URL, each put there whole and then proven to be what was put.

A store that tells a checksum of what it holds is taken at its word where that is the one of our bytes; of any other,
and where it is another (as of objects that the store encrypts), the file is read back. The hub takes commits: what is
put there waits for the next one, which brings all of it at once.
"""

from __future__ import annotations

import base64
import errno
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from sniffer.errors import RunError
from sniffer.storage.remote import AHEAD, listing
from sniffer.storage.urls import file_system, told
from sniffer.types.places import scheme_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

PIECE = 64 << 20
"""Bytes of a file of which more than two of these are sent in pieces, where a store takes pieces."""


@dataclass(frozen=True)
class Sums:
    """Of a file's bytes, as manifests and as stores tell them."""

    n_bytes: int
    sha256: str
    md5: str
    pieces: str
    """As S3 tells it of an object that was sent in pieces."""

    @classmethod
    def of(cls, content: bytes | Path) -> Sums:
        """Reads it once.

        Raises:
            OSError: the file cannot be read.
        """
        if isinstance(content, bytes):
            return cls._of(content[start : start + PIECE] for start in range(0, len(content), PIECE))
        with content.open("rb") as file:
            return cls._of(iter(lambda: file.read(PIECE), b""))

    @classmethod
    def _of(cls, pieces: Iterable[bytes]) -> Sums:
        n_bytes, sha256, md5, each = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False), []
        for piece in pieces:
            n_bytes += len(piece)
            sha256.update(piece)
            md5.update(piece)
            each.append(hashlib.md5(piece, usedforsecurity=False).digest())
        together = hashlib.md5(b"".join(each), usedforsecurity=False).hexdigest()
        return cls(n_bytes, sha256.hexdigest(), md5.hexdigest(), f"{together}-{len(each)}")

    def agree(self, info: Mapping[str, Any]) -> bool:
        """Whether what a store tells of a file is what it would tell of these bytes; False where it tells nothing."""
        etag = str(info.get("ETag", "")).strip('"').lower()
        lfs = info.get("lfs") or {}
        in_base64 = base64.b64encode(bytes.fromhex(self.md5)).decode()
        return (
            etag in (self.md5, self.pieces)
            or info.get("md5Hash") == in_base64
            or (isinstance(lfs, Mapping) and lfs.get("sha256") == self.sha256)
        )


WITH_FOLDERS = ("sftp",)
"""Schemes whose files lie in folders, which are there before their files."""


class Target:
    """Files below a URL, by their paths there.

    Raises, in all that it does:
        RunError: a package is missing.
        OSError: it cannot be reached, or refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.system = file_system(url, patient=False)

    def make(self) -> None:
        """Makes the place, where that is for us to do; buckets are their owner's."""

    def sizes(self) -> dict[str, int]:
        """All files that are there."""
        return {name: seen.st_size for name, seen in listing(self.url).items()}

    def read(self, path: str) -> bytes | None:
        """A small file; None where there is none."""
        with told(self._at(path)):
            self.system.invalidate_cache()
            try:
                return bytes(self.system.cat_file(self._at(path)))
            except FileNotFoundError:
                return None

    def put(self, content: bytes | Path, path: str) -> None:
        """Writes a file as a whole, in the place of the one of its name."""
        with told(self._at(path)):
            place = str(self.system._strip_protocol(self._at(path)))
            if scheme_of(self.url) in WITH_FOLDERS:
                self.system.makedirs(place.rpartition("/")[0], exist_ok=True)
            if isinstance(content, bytes):
                self.system.pipe_file(place, content)
            else:
                pieces = {"chunksize": PIECE} if self.url.startswith("s3://") else {}
                self.system.put_file(str(content), place, **pieces)

    def holds(self, path: str, sums: Sums) -> bool:
        """Whether a file there has these bytes."""
        with told(self._at(path)):
            self.system.invalidate_cache()
            try:
                info = self.system.info(self._at(path))
            except FileNotFoundError:
                return False
            if info.get("size") != sums.n_bytes:
                return False
            return sums.agree(info) or self._sha256(path, sums.n_bytes) == sums.sha256

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            with told(self._at(path)), suppress(FileNotFoundError):
                self.system.rm_file(self._at(path))

    def settle(self) -> None:
        """Brings what was put and removed before to where readers see it."""

    def _sha256(self, path: str, n_bytes: int) -> str:
        found = hashlib.sha256()
        for start in range(0, n_bytes, AHEAD):
            found.update(self.system.cat_file(self._at(path), start=start, end=min(start + AHEAD, n_bytes)))
        return found.hexdigest()

    def _at(self, path: str) -> str:
        return f"{self.url}/{path}"


class HubTarget(Target):
    """A dataset on the Hugging Face hub, hf://datasets/owner/name; each `settle` is a commit.

    The hub compares the bytes that it gets with their SHA-256 itself, before it takes a commit that names them.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        from huggingface_hub import HfApi
        from huggingface_hub.hf_file_system import HfFileSystem

        assert isinstance(self.system, HfFileSystem)
        self._api = HfApi(endpoint=self.system.endpoint, token=self.system.token)
        _, owner, name, *below = url.partition("://")[2].split("/")
        name, _, revision = name.partition("@")
        self._repo, self._revision = f"{owner}/{name}", unquote(revision) or None
        self._below = "".join(f"{part}/" for part in below)
        self._waiting: dict[str, CommitOperationAdd] = {}
        self._known: dict[str, str] = {}
        self._gone: set[str] = set()
        self._made = False

    def make(self) -> None:
        """Makes the dataset, and a branch that is named, if they are not there; the dataset for its owner alone."""
        if self._made:
            return
        with told(self.url):
            if not self._api.repo_exists(self._repo, repo_type="dataset"):
                self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)
            if self._revision is not None:
                self._api.create_branch(self._repo, repo_type="dataset", branch=self._revision, exist_ok=True)
        self._made = True

    def put(self, content: bytes | Path, path: str) -> None:
        from huggingface_hub import CommitOperationAdd

        place = self._below + path
        made = CommitOperationAdd(place, content if isinstance(content, bytes) else str(content))
        with told(self._at(path)), _no_bars():
            # Large files go now, and are there for whoever tries again; the commit then only names them.
            self._api.preupload_lfs_files(
                self._repo, [made], repo_type="dataset", revision=self._revision, free_memory=False
            )
        self._waiting[path], self._known[path] = made, made.upload_info.sha256.hex()
        self._gone.discard(path)

    def holds(self, path: str, sums: Sums) -> bool:
        if path in self._known:
            return self._known[path] == sums.sha256
        return super().holds(path, sums)

    def remove(self, paths: Iterable[str]) -> None:
        self._gone.update(paths)
        for path in self._gone & self._waiting.keys():
            del self._waiting[path], self._known[path]

    def _there(self, paths: set[str]) -> list[str]:
        """Of some, those that there are: a commit that removes another is refused."""
        return sorted(paths & self.sizes().keys()) if paths else []

    def settle(self) -> None:
        from huggingface_hub import CommitOperationDelete

        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *self._waiting.values(),
            *(CommitOperationDelete(self._below + path, is_folder=False) for path in self._there(self._gone)),
        ]
        if not operations:
            return
        with told(self.url), _no_bars():
            self._api.create_commit(
                self._repo,
                operations,
                repo_type="dataset",
                revision=self._revision,
                commit_message="Vectors captured with qk-sniffer",
            )
        sizes = self.sizes()
        for path, made in self._waiting.items():
            if sizes.get(path) != made.upload_info.size:
                raise OSError(errno.EIO, f"{path} has arrived as something else", self.url)
        self._waiting.clear()
        self._known.clear()
        self._gone.clear()


@contextmanager
def _no_bars() -> Iterator[None]:
    """The hub's client draws bars, over those of a run."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def target_at(url: str) -> Target:
    """What is written to at the URL of a folder.

    Raises:
        RunError: it cannot be written to so, or a package is missing.
    """
    if not url.startswith("hf://"):
        return Target(url)
    if len(url.split("/")) < 5 or not url.startswith("hf://datasets/"):
        raise RunError(f"{url} is no dataset of the hub: write it as hf://datasets/owner/name")
    return HubTarget(url)
