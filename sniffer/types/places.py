"""Where data lie: at a path of this machine, or at a URL, which fsspec opens."""

from __future__ import annotations

import re
from urllib.parse import urlsplit
from urllib.request import url2pathname

WEB = ("http", "https")
FOLDERS = ("s3", "gs", "hf", "az", "abfs", "sftp", "memory")
"""File systems that do nothing but hold files, and list those of a folder; what someone else wrote may name one."""

SCHEMES = (*WEB, *FOLDERS, "ftp")
"""Those that a file is read from."""

PACKAGES = {**dict.fromkeys(WEB, "aiohttp"), "s3": "s3fs", "gs": "gcsfs"}
"""Of the extra [remote], by what needs them."""


def is_url(place: str) -> bool:
    """Whether a place is a URL, such as https://host/file; a drive of Windows (C:\\) is none."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", place) is not None


def scheme_of(url: str) -> str:
    return url.partition("://")[0].lower()


def local_path(place: str) -> str:
    """A path, also where it was written as file:///..."""
    parts = urlsplit(place)
    return url2pathname(parts.path) if parts.scheme.lower() == "file" else place


def missing_package(scheme: str, error: ImportError) -> str:
    """What a file system needs that is not installed, and how to get it."""
    package = PACKAGES.get(scheme)
    way = "pip install 'qk-sniffer[remote]'" if package else " ".join(str(error).split())
    return f"needs {package or 'a package that is not installed'}: {way}"
