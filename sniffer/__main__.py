"""The command line: `python -m sniffer`. Compose, check, run; an error is one line.

Hydra prints errors over several lines, one of them its own. So it is asked to let them through, and
they are told here. Exit codes: 0 done, 1 refused or failed, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sniffer.config import conf_folder, refuse_results, register, resolve, save_config
from sniffer.errors import SnifferError
from sniffer.lock import hold


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def job(cfg: DictConfig) -> None:
    """One run: Hydra calls it once, or once per job of a sweep."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    with hold(folder):
        capture(cfg, folder, hydra_config.overrides.task)


def capture(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> None:
    """Checks and records the configuration, then runs it."""
    refuse_results(folder)
    config = resolve(cfg, overrides)
    save_config(folder, cfg)
    # What a wrong name costs should be a second: asked before torch and transformers are imported.
    config.model.check()

    from sniffer.capture import run

    run(config, folder)


def main() -> int:
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    register()
    try:
        with _errors_let_through():
            job()
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    except (HydraException, OmegaConfBaseException) as error:
        if show_traceback:
            raise
        print(one_line(error), file=sys.stderr)
        return 1
    except ValueError as error:
        # Hydra refuses a few overrides, such as sampler=null, with a bare ValueError.
        if show_traceback or not raised_in_hydra(error):
            raise
        print(one_line(error), file=sys.stderr)
        return 1
    return 0


def raised_in_hydra(error: BaseException) -> bool:
    """Whether the line that raised belongs to Hydra itself."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("hydra.")


def one_line(error: BaseException) -> str:
    """An error's message without Hydra's line breaks, and without what only helps Hydra's developers."""
    message = str(error)
    if unknown := re.match(r"Could not override '(.+?)'\.\s+To append [^{]+$", message):
        return f"there is no key {unknown[1]}: `python -m sniffer --cfg job` shows those that exist"
    kept = re.split(r"\n\s*(?:Config search path|full_key|See https?):?", message)[0]
    lines = [re.sub(r"\n\s+", ", ", kept.replace(":\n\t", ": ").replace("\n\t", ", "))]
    # Hydra says which key it could not set; only its cause says why.
    if not isinstance(error, SnifferError) and isinstance(error.__cause__, OmegaConfBaseException):
        lines.append(one_line(error.__cause__))
    return ": ".join(" ".join(line.split()) for line in lines if line.strip()) or type(error).__name__


@contextmanager
def _errors_let_through() -> Iterator[None]:
    """Keeps Hydra from printing errors, and from announcing them with a line of its own."""

    def return_value(self: JobReturn) -> Any:
        if self.status is JobStatus.COMPLETED:
            return self._return_value
        raise self._return_value

    quiet = vars(JobReturn)["return_value"].getter(return_value)
    with patch.dict(os.environ, HYDRA_FULL_ERROR="1"), patch.object(JobReturn, "return_value", quiet):
        yield


if __name__ == "__main__":
    sys.exit(main())
