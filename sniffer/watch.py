"""How the command line learns what Hydra starts, and where: Hydra tells only callbacks that it makes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sniffer.made_folder import first_existing


class Watch(Callback):
    """Named in conf/common.yaml. Afterwards the class knows the sweep of this process, and what was there before it."""

    root: ClassVar[Path | None] = None
    """Below it a single run makes its folder; None where that was there and held something."""
    sweep: ClassVar[Path | None] = None
    done_before: ClassVar[frozenset[str]] = frozenset()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.run.dir).absolute()
        taken = folder.is_dir() and any(folder.iterdir())
        Watch.root = None if taken else first_existing(folder)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from sniffer.jobs import read_jobs

        Watch.sweep, Watch.done_before = Path(config.hydra.sweep.dir).absolute(), frozenset()
        Watch.done_before = frozenset(job.name for job in read_jobs(Watch.sweep) if job.status == "complete")
