"""Where log lines go on screen: a handler that shares the terminal with the progress bar.

The configuration (conf/hydra/job_logging/rich.yaml) names `console_handler`; a `LogFile` beside it keeps a
copy in the run's folder.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

import rich
from rich.logging import RichHandler


def console_handler() -> logging.Handler:
    """Rich lines on a terminal; elsewhere plain ones, which are never wrapped."""
    console = rich.get_console()
    if console.is_terminal:
        return RichHandler(console=console, show_path=False, log_time_format="[%X]", omit_repeated_times=False)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    return handler


class LogFile(logging.FileHandler):
    """The copy. A line that the disk does not take ends no run, and is no reason for a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # of opening it
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        pass
