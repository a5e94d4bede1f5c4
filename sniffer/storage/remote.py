"""A folder at a URL, read as one of this machine is: s3://bucket/run, hf://datasets/owner/name, and their like.

`RemotePath` is a path of which fsspec reads the files. It joins, compares and prints as paths do, so whoever reads a
run folder need not know where it lies. A folder is listed once, when it is opened; that tells which files there are,
how large, and whether they have changed. Of a file, only what is asked for is fetched. Nothing is written through such
a path, and what takes it for one of this machine is refused.
"""

from __future__ import annotations

import errno
import io
import shutil
import stat
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PosixPath, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any

from sniffer.errors import RunError
from sniffer.storage.urls import file_system, require_url, told
from sniffer.types.places import is_url, local_path

AHEAD = 8 << 20
"""Bytes fetched at a time, where a file is read from its beginning to its end."""


def folder_at(place: str | Path) -> Path:
    """The absolute path of a folder of this machine; or that of one at a URL, whose files are then listed.

    Raises:
        RunError: as `named` and `RemotePath.listed`.
    """
    folder = named(place)
    return folder.listed() if isinstance(folder, RemotePath) else folder.expanduser().absolute()


def named(place: str | Path) -> Path:
    """What a folder's name means: a path of this machine, or a URL.

    Raises:
        RunError: it is a URL of a kind that is not read, or has a password in it.
    """
    text = str(place)
    if isinstance(place, RemotePath) or not is_url(text):
        return Path(place) if isinstance(place, str) else place
    return Path(path) if (path := local_path(text)) != text else RemotePath(require_url(text, ""))


@contextmanager
def at_hand(folder: Path, path: str) -> Iterator[Path]:
    """A folder of this machine with one of a folder's files: itself, or of one at a URL a copy, which is then gone.

    Raises:
        OSError: it cannot be fetched.
    """
    if not isinstance(folder, RemotePath):
        yield folder
        return
    with TemporaryDirectory(prefix="sniffer-") as copies:
        copy = Path(copies, path)
        copy.parent.mkdir(parents=True)
        if (folder / path).is_file():
            with (folder / path).open("rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, AHEAD)
        yield Path(copies)


@dataclass(frozen=True)
class Seen:
    """What a listing says of a file, under the names that `os.stat_result` has; `info` is all of it."""

    st_size: int
    info: Mapping[str, Any]
    st_mode: int = stat.S_IFREG | 0o444

    @property
    def st_mtime_ns(self) -> int:
        """Not a time, but another number for another content, as far as the listing tells."""
        return zlib.crc32(repr([self.info.get(name) for name in STAMPS]).encode())


STAMPS = ("ETag", "etag", "md5Hash", "content_settings", "blob_id", "oid", "LastModified", "last_modified", "created")

_LISTED: dict[str, dict[str, Seen]] = {}
"""By the URL of a folder, its files by their paths below it."""


class RemotePath(PosixPath):
    """A file or folder at a URL. What it has of `Path` beyond names is reading, and that of what `listed` found."""

    __slots__ = ()

    def listed(self) -> RemotePath:
        """This folder, its files listed anew.

        Raises:
            RunError: it cannot be listed, or has no file.
        """
        try:
            files = listing(str(self))
        except OSError as error:
            raise RunError(f"{self} cannot be listed: {error.strerror}; check the address and your access") from error
        if not files:
            raise RunError(f"{self} has no file: check the address and your access")
        for older in [url for url in list(_LISTED) if url.startswith(f"{self}/")]:  # a mirror's thread may add some
            _LISTED.pop(older, None)
        _LISTED[str(self)] = files
        return self

    def __str__(self) -> str:
        text = super().__str__()
        return text.replace(":/", "://", 1) if self.parts and self.parts[0].endswith(":") else text

    def __fspath__(self) -> str:
        raise RunError(f"{self} is a URL, and this is done with a folder of this machine alone: copy it first")

    def absolute(self) -> RemotePath:
        return self

    def expanduser(self) -> RemotePath:
        return self

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def is_absolute(self) -> bool:
        return True

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        if (found := self._known()) is None:
            raise FileNotFoundError(errno.ENOENT, "it is not there", str(self))
        return found

    def lstat(self) -> Any:
        return self.stat()

    def is_file(self, **_: Any) -> bool:
        return self._known() is not None

    def is_dir(self, **_: Any) -> bool:
        return self._known() is None and next(self._files(), None) is not None

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """Files below that a pattern without ** matches."""
        depth = len(self.parts) + len(PurePosixPath(pattern).parts)
        return (path for path in self._files() if len(path.parts) == depth and path.match(pattern))

    def iterdir(self) -> Generator[RemotePath, None, None]:
        depth = len(self.parts)
        names = dict.fromkeys(path.parts[depth] for path in self._files())
        return (self / name for name in names)

    def rglob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """All files below; the pattern is *."""
        assert pattern == "*"
        return self._files()

    def walk(self, *_: Any, **__: Any) -> Iterator[tuple[RemotePath, list[str], list[str]]]:
        """As `os.walk`: folders from the top, with the names of those in it, which may be taken out, and of files."""
        inside = sorted(self.iterdir())
        below = [path.name for path in inside if not path.is_file()]
        yield self, below, [path.name for path in inside if path.is_file()]
        for name in below:
            yield from (self / name).walk()

    def open(self, mode: str = "r", *_: Any, **__: Any) -> IO[Any]:  # type: ignore[override]
        """For reading bytes, "rb", from beginning to end."""
        assert mode == "rb"
        return io.BufferedReader(Ranges(self), AHEAD)

    def read_bytes(self) -> bytes:
        return Ranges(self).read()

    def _files(self) -> Iterator[RemotePath]:
        found = self._listing()
        if found is None:
            return iter(())
        root, files = found
        prefix = "" if root == self else f"{self.relative_to(root)}/"
        return (root / name for name in files if name.startswith(prefix))

    def _known(self) -> Seen | None:
        if (found := self._listing()) is not None:
            return found[1].get(str(self.relative_to(found[0])))
        with told(self):  # in another process than that which has listed the folder
            system = file_system(str(self))
            if not system.isfile(str(self)):
                return None
            info = system.info(str(self))
            return Seen(int(info["size"]), info)

    def _listing(self) -> tuple[RemotePath, dict[str, Seen]] | None:
        """The folder, of this one and those above it, that has been listed."""
        for place in (self, *self.parents):
            if (files := _LISTED.get(str(place))) is not None:
                return place, files
        return None


def listing(url: str) -> dict[str, Seen]:
    """The files below a URL by their paths there, as they are now; none where there is nothing.

    Raises:
        RunError: a package is missing.
        OSError: it cannot be told.
    """
    system = file_system(url)
    with told(url):
        system.invalidate_cache()
        root = str(system._strip_protocol(url)).rstrip("/")
        try:
            found = system.find(url, detail=True)
        except FileNotFoundError:  # such as a bucket
            return {}
        if any(not name.startswith(f"{root}/") for name in found):  # of hf://, whose names have the revision
            root = str(system.resolve_path(root).unresolve()).rstrip("/")
    files = {name.removeprefix(f"{root}/"): info for name, info in found.items() if name.startswith(f"{root}/")}
    return {name: Seen(int(info.get("size") or 0), info) for name, info in files.items() if info["type"] == "file"}


class Ranges(io.RawIOBase):
    """An open file of which each read fetches just the bytes that are asked for."""

    def __init__(self, path: Path) -> None:
        self._url, self._size, self._place = str(path), int(path.stat().st_size), 0
        self._system = file_system(self._url)
        # Else a whole block is fetched, of file systems that read through an open file.
        self._exactly = {} if getattr(self._system, "async_impl", False) else {"cache_type": "none"}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def size(self) -> int:
        return self._size

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._place + size)
        if end <= self._place:
            return b""
        with told(self._url):
            content = bytes(self._system.cat_file(self._url, start=self._place, end=end, **self._exactly))
        if len(content) != end - self._place:
            text = f"gave {len(content):,} bytes of {end - self._place:,}"
            raise OSError(errno.EIO, text, self._url)
        self._place = end
        return content

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        content = self.read(len(view))
        view[: len(content)] = content
        return len(content)
