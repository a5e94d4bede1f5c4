"""The command line: `python -m sniffer`. Compose, check, run; an error is one line.

Hydra prints errors over several lines, one of them its own. So it is asked to let them through, and
they are told here. Jobs of a sweep are noted as they begin and end (sweep/job.py). Exit codes: 0 done, 1 refused
or failed (of a sweep: any job), 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any
from unittest.mock import patch

import hydra.version
import rich
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sniffer.config.rerun import composable
from sniffer.config.resolve import ROLES, conf_folder, register, resolve
from sniffer.config.saving import holds_results, refuse_results, save_config
from sniffer.engine.model_cache import Load, load_anew
from sniffer.errors import RunError
from sniffer.storage.lock import hold
from sniffer.storage.made_folder import forget, remove_empty
from sniffer.storage.ownership import refuse_links
from sniffer.sweep.callback import Watch, sweeps_checked
from sniffer.terminal.printing import line
from sniffer.terminal.streams import standard_streams
from sniffer.words import one_line

log = logging.getLogger("sniffer")  # not __main__, of which nobody knows whose it is (terminal/logs.py)


def job(cfg: DictConfig, typed: Sequence[str], first: Path | None = None) -> None:
    """One run: Hydra calls it once, or once per job of a sweep.

    Args:
        typed: the words of the command line.
        first: the run that is run again, if one is.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if cfg.plan:
        tell_plan(cfg, folder, typed)
    elif hydra_config.mode is RunMode.MULTIRUN:
        job_of_sweep(cfg, Path(hydra_config.sweep.dir).absolute(), folder, typed)
    else:
        refuse_results(folder)
        with hold(folder), forgotten_if_refused(folder):
            capture(cfg, folder, typed)
        if first is not None:
            tell_rerun(first, folder)


def tell_rerun(first: Path, folder: Path) -> None:
    """Of a run that ran another one's configuration again: what is not as it was then."""
    from sniffer.runs.code import made_of_other

    if found := made_of_other(first, folder):
        log.warning("%s was made with something else: %s", first, "; ".join(found))


@contextmanager
def forgotten_if_refused(folder: Path) -> Iterator[None]:
    """Leaves no folder of a run that is refused; what stops it otherwise, such as a kill, leaves one to resume."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, OSError):
        if Watch.root is not None and not holds_results(folder):
            forget(folder, Watch.root)
        raise


def job_of_sweep(cfg: DictConfig, sweep: Path, folder: Path, typed: Sequence[str]) -> None:
    """A job of a sweep: begun, gone on with, or left alone where it is complete."""
    from sniffer.sweep.job import MODEL, go_on, noted

    if Watch.sweep is None:  # a launcher's process, which shares the terminal with others
        rich.reconfigure(force_terminal=False)
    with noted(sweep, folder):
        check_place(sweep, folder)
        if holds_results(folder):
            go_on(cfg, folder, typed)
        else:
            with hold(folder):
                capture(cfg, folder, typed, MODEL.load)


def check_place(sweep: Path, folder: Path) -> None:
    """Raises RunError, and leaves a job's folder as it is, where it holds something else or a link leads out of it."""
    try:
        refuse_links(sweep, folder / "sniffer.log")
        if not holds_results(folder):
            refuse_results(folder)
    except RunError:
        close_log_files()
        raise


def close_log_files() -> None:
    """So that log lines go to no file of a folder that is to be left alone."""
    for handler in [one for one in logging.root.handlers if isinstance(one, logging.FileHandler)]:
        logging.root.removeHandler(handler)


def tell_plan(cfg: DictConfig, folder: Path, typed: Sequence[str]) -> None:
    """What the run would need; nothing is left of the folder that Hydra made for it."""
    from sniffer.plan import tell

    close_log_files()
    if not any(folder.iterdir()):
        remove_empty(folder, Watch.root or folder.parent)
    tell(resolve(cfg, typed, ROLES))


def capture(cfg: DictConfig, folder: Path, typed: Sequence[str], load: Load = load_anew) -> None:
    """Checks and records the configuration, then runs it."""
    refuse_results(folder)
    config = resolve(cfg, typed, ROLES)
    save_config(folder, cfg)
    # What a wrong name costs should be a second: asked before torch and transformers are imported.
    config.model.check()

    from sniffer.capture import run

    run(config, folder, load=load)


@standard_streams()
def main() -> int:
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    register()
    try:
        with _errors_let_through(), sweeps_checked(), composable(get_args_parser().parse_args()) as arguments:
            return run_all(arguments)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if show_traceback:
            raise
        line(one_line(error), error=True)
        return 1
    except Exception as error:
        # The system refuses what a user names. Hydra refuses a few overrides, such as sampler=null, with any error.
        if show_traceback or not (isinstance(error, OSError) or raised_in_hydra(error)):
            raise
        kind = "" if isinstance(error, OSError | ValueError | OverflowError) else f"Hydra, {type(error).__name__}: "
        line(f"{kind}{one_line(error)}", error=True)
        return 1


def run_all(arguments: Namespace) -> int:
    """The run, or all jobs of the sweep, which is told of also when something stops it. Returns the exit code."""
    Watch.sweep = Watch.root = None
    lost = ""
    code = 0
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
    """What @hydra.main does with a command line, but that the job gets to know what was typed."""
    typed, first = tuple(arguments.overrides), arguments.rerun_of

    def task(cfg: DictConfig) -> None:
        job(cfg, typed, first)

    hydra.version.setbase("1.3")
    _run_hydra(arguments, get_args_parser(), task, config_path=str(conf_folder()), config_name="config")


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


@contextmanager
def _errors_let_through() -> Iterator[None]:
    """Keeps Hydra from printing errors, and from announcing them with a line of its own.

    A log line that cannot be written, on a full disk or into a closed pipe, is no reason for a traceback either.
    """

    def return_value(self: JobReturn) -> Any:
        if self.status is JobStatus.COMPLETED:
            return self._return_value
        raise self._return_value

    quiet = vars(JobReturn)["return_value"].getter(return_value)
    with (
        patch.dict(os.environ, HYDRA_FULL_ERROR="1"),
        patch.object(JobReturn, "return_value", quiet),
        patch.object(logging, "raiseExceptions", False),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
