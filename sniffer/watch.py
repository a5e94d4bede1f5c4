"""How the command line learns that it starts a sweep: Hydra says so only to callbacks that it makes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Watch(Callback):
    """Named in conf/common.yaml. Afterwards the class knows the sweep of this process, and what was done before it."""

    sweep: ClassVar[Path | None] = None
    done_before: ClassVar[frozenset[str]] = frozenset()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from sniffer.jobs import read_jobs

        Watch.sweep, Watch.done_before = Path(config.hydra.sweep.dir).absolute(), frozenset()
        Watch.done_before = frozenset(job.name for job in read_jobs(Watch.sweep) if job.status == "complete")
