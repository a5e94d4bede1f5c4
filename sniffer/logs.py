"""Where log lines go on screen: a handler that shares the terminal with the progress bar.

The configuration (conf/hydra/job_logging/rich.yaml) names `console_handler`; a file handler beside it
keeps a copy in the run's folder.
"""

from __future__ import annotations

import logging
import sys

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
