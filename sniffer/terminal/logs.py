"""Where log lines go on screen: a handler that shares the terminal with the progress bar.

The configuration (conf/hydra/job_logging/rich.yaml) names `console_handler`; a `LogFile` beside it keeps a
copy in the run's folder.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

import rich
from rich.logging import RichHandler

from sniffer.storage.lock import CAREFULLY
from sniffer.words import printable


def console_handler() -> logging.Handler:
    """Rich lines on a terminal; elsewhere plain ones, which are never wrapped."""
    console = rich.get_console()
    if console.is_terminal:
        rich_handler = RichHandler(console=console, show_path=False, log_time_format="[%X]", omit_repeated_times=False)
        rich_handler.setFormatter(LineFormatter("%(message)s"))
        return rich_handler
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    return handler


class LogFile(logging.FileHandler):
    """The copy. A line that the disk does not take ends no run, and is no reason for a traceback."""

    def _open(self) -> TextIOWrapper:
        options = {"encoding": self.encoding, "errors": self.errors}
        return open(self.baseFilename, self.mode, opener=_open_plain, **options)  # type: ignore[call-overload]

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # of opening it
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass


def _open_plain(path: str, flags: int) -> int:
    """Opens a file that is there, or a new one: no link, and no FIFO, which would wait for a reader."""
    handle = os.open(path, flags | CAREFULLY, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "no plain file", path)
    return handle


class LineFormatter(logging.Formatter):
    """Log lines without codes for a terminal, also where they are read later; tracebacks keep their line breaks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        ours = record.name.startswith(OURS)
        return printable(super().formatMessage(record), keep="" if ours else "\n")

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return printable(super().formatException(ei), keep="\n", most=TRACEBACK)


TRACEBACK = 1 << 20
"""Characters, at most."""

OURS = ("sniffer", "models", "experiments")
"""Loggers whose messages are lines."""
