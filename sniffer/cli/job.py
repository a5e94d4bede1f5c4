"""One job of the command line: a run, a part of a sweep, or a plan of either, in the folder that Hydra chose for it.

Hydra's DictConfig ends in `job`. What follows gets a Config, made where the folder is known to be free for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sniffer.config.resolve import ROLES, resolve
from sniffer.config.saving import holds_results, refuse_results, save_plain
from sniffer.config.schema import Config
from sniffer.engine.model_cache import Load, load_anew
from sniffer.errors import RunError
from sniffer.storage.layout import RunFolder
from sniffer.storage.lock import hold
from sniffer.storage.made_folder import forget, remove_empty
from sniffer.storage.ownership import refuse_links
from sniffer.sweep.callback import Watch
from sniffer.terminal.printing import no_terminal

log = logging.getLogger("sniffer")

Configured = Callable[[], Config]
"""Checks and builds the configuration; raises ConfigError."""


def job(cfg: DictConfig, typed: Sequence[str], first: Path | None = None) -> None:
    """Hydra calls it once, or once per job of a sweep.

    Args:
        typed: the words of the command line.
        first: the run that is run again, if one is.
    """
    hydra, configured = HydraConfig.get(), partial(resolve, cfg, typed, ROLES)
    folder = Path(hydra.runtime.output_dir)
    if cfg.plan:
        tell_plan(configured, folder)
    elif hydra.mode is RunMode.MULTIRUN:
        job_of_sweep(configured, Path(hydra.sweep.dir).absolute(), folder)
    else:
        refuse_results(folder)
        with hold(folder), forgotten_if_refused(folder):
            capture(configured, folder)
        if first is not None:
            tell_rerun(first, folder)


def capture(configured: Configured, folder: Path, load: Load = load_anew) -> None:
    """Checks and records the configuration, then runs it."""
    refuse_results(folder)
    config = configured()
    save_plain(folder, config.saved)
    # What a wrong name costs should be a second: asked before torch and transformers are imported.
    config.model.check()

    from sniffer.capture import run

    run(config, folder, load=load)


def job_of_sweep(configured: Configured, sweep: Path, folder: Path) -> None:
    """A job of a sweep: begun, gone on with, or left alone where it is complete."""
    from sniffer.sweep.job import MODEL, go_on, noted

    # A launcher's process shares the terminal with others.
    with no_terminal() if Watch.sweep is None else nullcontext(), noted(sweep, folder):
        check_place(sweep, folder)
        if holds_results(folder):
            go_on(configured(), folder)
        else:
            with hold(folder):
                capture(configured, folder, MODEL.load)


def tell_plan(configured: Configured, folder: Path) -> None:
    """What the run would need; nothing is left of the folder that Hydra made for it."""
    from sniffer.cli.plan import tell

    close_log_files()
    if not any(folder.iterdir()):
        remove_empty(folder, Watch.root or folder.parent)
    tell(configured())


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


def check_place(sweep: Path, folder: Path) -> None:
    """Raises RunError, and leaves a job's folder as it is, where it holds something else or a link leads out of it."""
    try:
        refuse_links(sweep, folder / RunFolder.LOG)
        if not holds_results(folder):
            refuse_results(folder)
    except RunError:
        close_log_files()
        raise


def close_log_files() -> None:
    """So that log lines go to no file of a folder that is to be left alone."""
    for handler in [one for one in logging.root.handlers if isinstance(one, logging.FileHandler)]:
        logging.root.removeHandler(handler)
