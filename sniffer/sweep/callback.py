"""How the command line learns what Hydra starts, and where: Hydra tells only callbacks that it makes itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from sniffer.process.patched import patched
from sniffer.storage.made_folder import first_existing
from sniffer.storage.ownership import refuse_foreign_sweep


class Watch(Callback):
    """Named in conf/common.yaml. Once Hydra starts, the class knows the sweep of this process, and what was there
    before it; what it knows ends with `watching`."""

    root: ClassVar[Path | None] = None
    """Below it a single run makes its folder; None where that was there and held something."""
    sweep: ClassVar[Path | None] = None
    done_before: ClassVar[frozenset[str]] = frozenset()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.run.dir).absolute()
        taken = folder.is_dir() and any(folder.iterdir())
        Watch.root = None if taken else first_existing(folder)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        from sniffer.reader.index import read_jobs

        Watch.sweep, Watch.done_before = Path(config.hydra.sweep.dir).absolute(), frozenset()
        Watch.done_before = frozenset(job.name for job in read_jobs(Watch.sweep) if job.status == "complete")


@contextmanager
def watching() -> Iterator[None]:
    """Has Hydra tell Watch, and look at a sweep's folder before it makes the sweeper, which would write into it.

    A callback cannot refuse: Hydra turns what it raises into a warning.
    """
    honest = Plugins.instantiate_sweeper

    def instantiate_sweeper(self: Plugins, *, config: DictConfig, **options: Any) -> Sweeper:
        sweep, Watch.sweep = Watch.sweep, None
        refuse_foreign_sweep(Path(config.hydra.sweep.dir).absolute())
        Watch.sweep = sweep
        return honest(self, config=config, **options)

    with (
        patched(Plugins, "instantiate_sweeper", instantiate_sweeper),
        patched(Watch, "root", None),
        patched(Watch, "sweep", None),
        patched(Watch, "done_before", frozenset()),
    ):
        yield
