"""URLs of folders, the file systems behind them, and what goes wrong there, in few words."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sniffer.errors import RunError, first_cause, first_line
from sniffer.types.places import FOLDERS, is_url, missing_package, scheme_of


def require_url(url: str, key: str) -> str:
    """The URL of a folder as it is written here; `key` is what to call it, such as "output.mirror=".

    Raises:
        RunError: as `folder_at`.
    """
    if scheme_of(url) not in FOLDERS or "::" in url:
        known = ", ".join(f"{scheme}://" for scheme in FOLDERS)
        path = ", or a path" if is_url(url) and not key else ""  # which may be read, and is no place for a copy
        raise RunError(f"{key}{url} is no URL of a folder: wanted {known}{path}")
    parts = urlsplit(url)
    if parts.password is not None:
        raise RunError(f"{key}{scheme_of(url)}://... has a password in its URL: give it another way")
    if not parts.netloc or parts.query or parts.fragment:
        raise RunError(f"{key}{url} names no folder: write it as s3://bucket/folder")
    return f"{scheme_of(url)}://{url.partition('://')[2].strip('/')}"


SILENCE = 15.0
"""Seconds without a byte from a server of s3://, after which a request has failed."""

HUB_SILENCE = 60.0
"""Of the hub, where its client would wait for ever: a commit of many files takes its time."""


def file_system(url: str, *, patient: bool = True) -> Any:
    """What reads and writes below a URL; made anew in each process, as fsspec needs it.

    Args:
        patient: whether it tries again itself, some times; not where the caller does.
    """
    import fsspec

    for name in CHATTY:
        if (logger := logging.getLogger(name)).level == logging.NOTSET:
            logger.setLevel(logging.WARNING)
    scheme, attempts = scheme_of(url), 3 if patient else 2
    with told(url):
        system, _ = fsspec.core.url_to_fs(url, **_limits(scheme, attempts))  # whose host is in the URL for some
    if scheme == "s3":  # Of its own, around those that are below it: together they would go on for many minutes.
        system.retries = 2 if patient else 1
    return system


def _limits(scheme: str, attempts: int) -> dict[str, Any]:
    """How long a file system waits, and how often it tries, as its class takes it."""
    if scheme != "s3":
        return {}
    seconds = {"connect_timeout": SILENCE, "read_timeout": SILENCE}
    return {"config_kwargs": {**seconds, "retries": {"total_max_attempts": attempts, "mode": "standard"}}}


def _limit_hub() -> None:
    """Has the client that all of huggingface_hub shares wait so long where nobody has said how long."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    if _limit not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _limit]}


def _limit(request: Any) -> None:
    limits = request.extensions.get("timeout") or {}
    request.extensions = {**request.extensions, "timeout": {**dict.fromkeys(WAITS, HUB_SILENCE), **_known(limits)}}


WAITS = ("connect", "read", "write", "pool")


def _known(limits: Mapping[str, float | None]) -> dict[str, float]:
    return {wait: seconds for wait, seconds in limits.items() if seconds is not None}


CHATTY = ("aiobotocore", "botocore")
"""They say with each session where credentials are from."""


@contextmanager
def told(url: str | Path) -> Iterator[None]:
    """Has whatever a network's library raises be an OSError in few words, and a missing package be named.

    Raises:
        RunError: the package is missing.
        OSError: anything else.
    """
    try:
        if scheme_of(str(url)) == "hf":
            _limit_hub()
        yield
    except RunError:
        raise
    except ImportError as error:
        raise RunError(f"{url} {missing_package(scheme_of(str(url)), error)}") from error
    except Exception as error:
        cause = first_cause(error)
        # Of these the constructor of OSError makes FileNotFoundError and PermissionError.
        number = next((n for kind, n in NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        if "timeout" in type(cause).__name__.lower():
            raise TimeoutError(errno.ETIMEDOUT, "it did not answer in time", str(url)) from error
        raise OSError(number, _words(cause), str(url)) from error


def _words(cause: BaseException) -> str:
    """What a library says, without what an address in it may let anyone do: its query, a user's name and password."""
    if isinstance(cause, FileNotFoundError):
        return "it is not there"
    return ADDRESS.sub(r"\1\2", first_line(cause))


ADDRESS = re.compile(r"(\bhttps?://)(?:[^\s/@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\")]*)?")


NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
