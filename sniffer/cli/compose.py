"""Hydra, called as @hydra.main calls it, but that jobs get to know what was typed, and errors reach whoever tells them.

Hydra prints errors over several lines, one of them its own. So it is asked to let them through. Jobs of a sweep are
noted as they begin and end (sweep/job.py); the sweep itself is told of at its end, also when something stops it.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import hydra.version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sniffer.cli.job import job
from sniffer.config.meant import with_meant
from sniffer.config.quoting import refuse_unreadable
from sniffer.config.rerun import composable
from sniffer.config.resolve import conf_folder, register
from sniffer.process.patched import environment, patched
from sniffer.sweep.callback import Watch, watching
from sniffer.terminal.command import refusal
from sniffer.words import one_line


def run_all() -> int:
    """The run, or all jobs of the sweep, that the command line asks for. Returns the exit code."""
    register()
    with errors_let_through(), watching(), composable(get_args_parser().parse_args()) as arguments:
        refuse_unreadable(arguments.overrides, sweep=arguments.multirun)
        code, lost = 0, ""
        try:
            run_hydra(arguments)
        except (HydraException, OmegaConfBaseException):
            raise
        except Exception as error:
            if Watch.sweep is None or not raised_in_launcher(error):
                raise
            # Jobs note their own errors: one of its processes was killed, say.
            lost = f"{type(error).__name__}: {one_line(error)}"
        finally:
            if Watch.sweep is not None:
                from sniffer.sweep.job import finish

                code = finish(Watch.sweep, Watch.done_before, lost)
        return code


def run_hydra(arguments: Namespace) -> None:
    """What @hydra.main does with a command line."""
    typed, first = tuple(arguments.overrides), arguments.rerun_of

    def task(cfg: DictConfig) -> None:
        job(cfg, typed, first)

    hydra.version.setbase("1.3")
    _run_hydra(arguments, get_args_parser(), task, config_path=str(conf_folder()), config_name="config")


@contextmanager
def errors_let_through() -> Iterator[None]:
    """Keeps Hydra from printing errors, and from announcing them with a line of its own.

    A log line that cannot be written, on a full disk or into a closed pipe, is no reason for a traceback either.
    """

    def return_value(self: JobReturn) -> Any:
        if self.status is JobStatus.COMPLETED:
            return self._return_value
        raise self._return_value

    quiet = vars(JobReturn)["return_value"].getter(return_value)
    with (
        environment("HYDRA_FULL_ERROR", "1"),
        patched(JobReturn, "return_value", quiet),
        patched(logging, "raiseExceptions", False),
    ):
        yield


def told(error: Exception) -> str | None:
    """What to tell of an error; None for one of our own making.

    Hydra refuses a few overrides, such as sampler=null, with any error.
    """
    if (said := refusal(error)) is not None:
        return with_meant(said, conf_folder())
    if not raised_in_hydra(error):
        return None
    kind = "" if isinstance(error, ValueError | OverflowError) else f"Hydra, {type(error).__name__}: "
    return f"{kind}{one_line(error)}"


def raised_in_launcher(error: BaseException) -> bool:
    """Whether a plugin that runs the jobs of a sweep raised, itself or in what it called."""
    return any(name.startswith("hydra_plugins.") for name in _modules_of(error))


def raised_in_hydra(error: BaseException) -> bool:
    """Whether Hydra raised, itself or in what it called, and not our job."""
    names = _modules_of(error)
    raisers = [name.split(".")[0] for name in names if name.startswith(("hydra.", "sniffer.", "models."))]
    return raisers[-1:] == ["hydra"]


def _modules_of(error: BaseException) -> list[str]:
    """The modules that the error came through, innermost last."""
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in walk_tb(error.__traceback__)]
