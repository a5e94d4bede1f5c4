"""URLs of folders, the file systems behind them, and what goes wrong there, in few words."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sniffer.errors import RunError, first_cause, first_line
from sniffer.types.places import FOLDERS, missing_package, scheme_of


def require_url(url: str, key: str) -> str:
    """The URL of a folder as it is written here; `key` is what to call it, such as "output.mirror=".

    Raises:
        RunError: as `folder_at`.
    """
    if scheme_of(url) not in FOLDERS or "::" in url:
        known = ", ".join(f"{scheme}://" for scheme in FOLDERS)
        raise RunError(f"{key}{url} is no URL of a folder: wanted {known}, or a path")
    parts = urlsplit(url)
    if parts.password is not None:
        raise RunError(f"{key}{scheme_of(url)}://... has a password in its URL: give it another way")
    if not parts.netloc or parts.query or parts.fragment:
        raise RunError(f"{key}{url} names no folder: write it as s3://bucket/folder")
    return f"{scheme_of(url)}://{url.partition('://')[2].strip('/')}"


def file_system(url: str, *, patient: bool = True) -> Any:
    """What reads and writes below a URL; made anew in each process, as fsspec needs it.

    Args:
        patient: whether it tries again itself, for some minutes; not where the caller does.
    """
    import fsspec

    for name in CHATTY:
        if (logger := logging.getLogger(name)).level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
    options = {} if patient else HASTY.get(scheme_of(url), {})
    with told(url):
        system, _ = fsspec.core.url_to_fs(url, **options)  # whose host is in the URL for some
    if options:
        system.retries = 1
    return system


CHATTY = ("aiobotocore", "botocore")
"""They say with each session where credentials are from."""

HASTY: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"total_max_attempts": 2, "mode": "standard"}}}}
"""Where a server is silent, s3fs and what is below it would each try five times, for some minutes together."""


@contextmanager
def told(url: str | Path) -> Iterator[None]:
    """Has whatever a network's library raises be an OSError in few words, and a missing package be named.

    Raises:
        RunError: the package is missing.
        OSError: anything else.
    """
    try:
        yield
    except RunError:
        raise
    except ImportError as error:
        raise RunError(f"{url} {missing_package(scheme_of(str(url)), error)}") from error
    except Exception as error:
        cause = first_cause(error)
        # Of these the constructor of OSError makes FileNotFoundError and PermissionError.
        number = next((n for kind, n in NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        said = "it is not there" if isinstance(cause, FileNotFoundError) else first_line(cause)
        raise OSError(number, said, str(url)) from error


NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
