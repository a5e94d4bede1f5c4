"""The command line: `python -m sniffer`. Compose, check, run; an error is one line.

Hydra prints errors over several lines, one of them its own. So it is asked to let them through, and
they are told here. Jobs of a sweep are noted as they begin and end (sweeping.py). Exit codes: 0 done, 1 refused
or failed (of a sweep: any job), 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any
from unittest.mock import patch

import hydra
import rich
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sniffer.config import conf_folder, holds_results, refuse_results, register, resolve, save_config
from sniffer.loading import Load, load_anew
from sniffer.lock import hold
from sniffer.made_folder import forget, remove_empty
from sniffer.runs.saved import check_rerun
from sniffer.streams import standard_streams
from sniffer.told import one_line
from sniffer.watch import Watch

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def job(cfg: DictConfig) -> None:
    """One run: Hydra calls it once, or once per job of a sweep."""
    hydra_config = HydraConfig.get()
    folder, overrides = Path(hydra_config.runtime.output_dir), hydra_config.overrides.task
    if cfg.plan:
        tell_plan(cfg, folder, overrides)
    elif hydra_config.mode is RunMode.MULTIRUN:
        job_of_sweep(cfg, Path(hydra_config.sweep.dir).absolute(), folder, overrides)
    else:
        with hold(folder), forgotten_if_refused(folder):
            capture(cfg, folder, overrides)
        tell_rerun(folder)


def tell_rerun(folder: Path) -> None:
    """Of a run that ran another one's configuration again: what is not as it was then."""
    from sniffer.runs.code import made_of_other

    if (first := _rerun_of()) is not None and (found := made_of_other(first, folder)):
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


def job_of_sweep(cfg: DictConfig, sweep: Path, folder: Path, overrides: Sequence[str]) -> None:
    """A job of a sweep: begun, gone on with, or left alone where it is complete."""
    from sniffer.sweeping import MODEL, go_on, noted

    if Watch.sweep is None:  # a launcher's process, which shares the terminal with others
        rich.reconfigure(force_terminal=False)
    with noted(sweep, folder):
        if holds_results(folder):
            go_on(cfg, folder, overrides)
        else:
            with hold(folder):
                capture(cfg, folder, overrides, MODEL.load)


def tell_plan(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> None:
    """What the run would need; nothing is left of the folder that Hydra made for it."""
    from sniffer.plan import tell

    for handler in [one for one in logging.root.handlers if isinstance(one, logging.FileHandler)]:
        logging.root.removeHandler(handler)
    if not any(folder.iterdir()):
        remove_empty(folder, Watch.root or folder.parent)
    tell(resolve(cfg, overrides))


def capture(cfg: DictConfig, folder: Path, overrides: Sequence[str], load: Load = load_anew) -> None:
    """Checks and records the configuration, then runs it."""
    refuse_results(folder)
    config = resolve(cfg, overrides)
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
        with _errors_let_through():
            _check_saved()
            return run_all()
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if show_traceback:
            raise
        print(one_line(error), file=sys.stderr)
        return 1
    except Exception as error:
        # The system refuses what a user names. Hydra refuses a few overrides, such as sampler=null, with any error.
        if show_traceback or not (isinstance(error, OSError) or raised_in_hydra(error)):
            raise
        kind = "" if isinstance(error, OSError | ValueError | OverflowError) else f"Hydra, {type(error).__name__}: "
        print(f"{kind}{one_line(error)}", file=sys.stderr)
        return 1


def run_all() -> int:
    """The run, or all jobs of the sweep, which is told of also when something stops it. Returns the exit code."""
    Watch.sweep = Watch.root = None
    lost = ""
    code = 0
    try:
        job()
    except (HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        if Watch.sweep is None or not raised_in_launcher(error):
            raise
        # Jobs note their own errors: one of its processes was killed, say.
        lost = f"{type(error).__name__}: {one_line(error)}"
    finally:
        if Watch.sweep is not None:
            from sniffer.sweeping import finish

            code = finish(Watch.sweep, Watch.done_before, lost)
    return code


def _check_saved() -> None:
    """Reads the rerun.yaml of a run folder before Hydra does, which would do as it is told there."""
    if (folder := _rerun_of()) is not None:
        check_rerun(folder, get_args_parser().parse_known_args()[0].overrides)


def _rerun_of() -> Path | None:
    """The run folder whose rerun.yaml the command line names."""
    arguments, _ = get_args_parser().parse_known_args()
    named = arguments.config_dir and str(arguments.config_name).removesuffix(".yaml") == "rerun"
    return Path(arguments.config_dir) if named else None


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
