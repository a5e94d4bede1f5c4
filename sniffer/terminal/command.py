"""What stands around every command of ours: streams that may break, an error as one line, an exit code.

0 done, 1 refused or failed, 130 after Ctrl-C, 143 after SIGTERM. What nobody foresaw keeps its traceback, and
HYDRA_FULL_ERROR=1 shows that of any error.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sniffer.terminal.printing import line
from sniffer.terminal.streams import Stream, is_lost, standard_streams
from sniffer.words import one_line

REFUSALS = (HydraException, OmegaConfBaseException, YAMLError, OSError)
"""Ours, which are Hydra's too; those of what reads a user's words and files; what the system refuses."""


def refusal(error: Exception) -> str | None:
    """What to tell of an error that is meant for the person at the terminal; None for any other."""
    return one_line(error) if isinstance(error, REFUSALS) else None


def exit_code(command: Callable[[], int], told: Callable[[Exception], str | None] = refusal) -> int:
    """Runs a command to its exit code.

    Args:
        told: what to tell of an error; None lets it through.
    """
    with standard_streams():
        try:
            return command()
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            return 128 + int(getattr(error, "signum", signal.SIGINT))
        except Exception as error:
            said = None if os.environ.get("HYDRA_FULL_ERROR") == "1" else told(error)
            if said is None:
                raise
            line(said, error=True)
            return 1


def output_is_lost() -> bool:
    """Whether what was printed so far did not all arrive, and somebody may have wanted it."""
    sys.stdout.flush()
    return isinstance(sys.stdout, Stream) and is_lost(sys.stdout)
