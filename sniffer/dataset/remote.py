"""Files that a URL means, as fsspec opens it: fetched once, and from then on read like those of a folder.

So a file is the same dataset wherever it lies: its ids, its texts, and what the manifest records of it (bytes and their
digest). The copies lie in a temporary folder, under the names that the files have below the part of the URL that is
fixed, and are gone with the dataset.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from sniffer.errors import DatasetError, first_cause, first_line
from sniffer.types.places import SCHEMES, WEB, missing_package, scheme_of

SECONDS = 60
"""That a server may be silent for."""


class Remote:
    """The files of a URL: one, or those that a glob matches.

    Raises:
        DatasetError: it is of a kind that is not read, or has a password in it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.scheme = scheme_of(url)
        if self.scheme not in SCHEMES or "::" in url:
            known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise self._refusal(f"is not a URL that is read: wanted {known}, or a path")
        if urlsplit(url).password is not None:
            raise DatasetError("dataset.path has a password in its URL, which the run would save: give it another way")

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="sniffer-")

    @property
    def folder(self) -> Path:
        """Where the copies are; ids are relative to it, as those of local files are to theirs."""
        return Path(self._folder.name)

    @cached_property
    def files(self) -> list[Path]:
        """The copies, in the order that local files would have.

        Raises:
            DatasetError: there is no such file, or it cannot be fetched.
        """
        try:
            system, path = self._opened()
            found = self._found(system, path)
            for file, name in found.items():
                self._fetch(system, file, self.folder / name)
        except DatasetError:
            raise
        except ImportError as error:
            raise self._refusal(missing_package(self.scheme, error)) from error
        except Exception as error:  # of a network's library: any
            cause = first_cause(error)
            if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
                raise self._refusal("is not there: check the address, and of a private one your access") from error
            way = "check the address, the network and your access"
            raise self._refusal(f"cannot be fetched ({first_line(cause)}): {way}") from error
        if not found:
            raise self._refusal("no file matches this glob")
        return sorted((self.folder / name for name in found.values()), key=Path.as_posix)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Has errors name the files as they were given, and not their copies."""
        try:
            yield
        except DatasetError as error:
            raise type(error)(self.as_given(str(error))) from error

    def as_given(self, message: str) -> str:
        """A message with the URLs of files, in place of their copies."""
        return message.replace(f"{self.folder}/", self._fixed)

    @property
    def _fixed(self) -> str:
        """The URL as far as it is the folder of all files."""
        return self.url[: self.url.rindex("/", 0, _magic(self.url, self.scheme)) + 1]

    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {}
        if self.scheme in WEB:
            import aiohttp

            # By default, a download would have five minutes.
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=SECONDS, sock_read=SECONDS)}
        system, path = url_to_fs(self.url, **options)
        return system, path

    def _found(self, system: Any, path: str) -> dict[str, PurePosixPath]:
        """The files, each with the name that its copy is to have."""
        end = _magic(path, self.scheme)
        if end == len(path):
            name = PurePosixPath(urlsplit(path).path if self.scheme in WEB else path).name
            if not name or name == "..":
                raise self._refusal("names no file: give one, or a glob")
            if self.scheme not in WEB and system.isdir(path):
                raise self._refusal("is a folder: name its files with a glob, such as /*.jsonl")
            return {path: PurePosixPath(name)}
        fixed = path[: path.rindex("/", 0, end) + 1]
        found = {
            file: PurePosixPath(file.removeprefix(fixed))
            for file, told in system.glob(path, detail=True).items()
            if told.get("type") != "directory"
        }
        for file, below in found.items():
            if not file.startswith(fixed) or below.is_absolute() or ".." in below.parts:
                raise self._refusal(f"lists a file {file!r}, which is not below {fixed}")
        return found

    def _fetch(self, system: Any, file: str, copy: Path) -> None:
        wanted, free = system.info(file).get("size") or 0, shutil.disk_usage(self.folder).free
        if wanted > free:
            raise self._refusal(
                f"is of {wanted:,} bytes, and {self.folder.parent} has {free:,} free: set TMPDIR to a larger disk"
            )
        copy.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(file, str(copy))
        if wanted and copy.stat().st_size != wanted:
            raise self._refusal(f"gave {copy.stat().st_size:,} bytes of {wanted:,}: try again")

    def _refusal(self, why: str) -> DatasetError:
        return DatasetError(f"dataset.path={self.url} {why}")


def _magic(path: str, scheme: str) -> int:
    """Where a glob has its first wildcard; the length of a path that is none. In a web address ? begins a query."""
    found = re.search(r"[*[]" if scheme in WEB else r"[*?[]", path)
    return len(path) if found is None else found.start()
