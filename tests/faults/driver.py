"""Runs of the real command line in processes of their own, which can be hit at any moment.

Processes are forked from a server that has torch and transformers imported already, so that a run takes about
a second and faults fall into the run itself rather than into its imports. What a fault does to it (a
signal, a kill at a certain step on its way to the disk, a slower model) is decided before it starts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sniffer.models import finder, loaded

from sniffer.storage import following
from tests.helpers_disk import Disk, failing

finder.install()
import transformers.models.llama.modeling_llama  # noqa: E402, F401 - so that forked processes need not

SLOWER = 0.02
"""Seconds that each forward of the tiny model takes more, so that there is something to hit."""


@dataclass(frozen=True)
class Fault:
    """What happens to a process: killed at its n-th step to the disk, or before its n-th part leaves; limited in what
    it may write; on a disk that fails (helpers_disk.py), with a log of its calls written to `calls` in the end.
    `environment` is added to its own.
    """

    kill_at_step: int | None = None
    kill_at_removal: int | None = None
    largest_file: int | None = None
    disk: Disk | None = None
    calls: Path | None = None
    environment: tuple[tuple[str, str], ...] = ()


NO_FAULT = Fault()


class Command:
    """One command line in a process of its own; its output goes to a file."""

    def __init__(self, output: Path, module: str, *arguments: str, fault: Fault = NO_FAULT) -> None:
        self.output = output
        self._process: Any = _context().Process(target=_child, args=(str(output), module, arguments, fault))
        self._process.start()

    def wait(self) -> int:
        """The exit code, negative for a signal that was not handled."""
        self._process.join(120)
        assert self._process.exitcode is not None, f"still running: {self.text}"
        return int(self._process.exitcode)

    def send(self, number: signal.Signals) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    @property
    def alive(self) -> bool:
        return bool(self._process.is_alive())

    def wait_for(self, path: Path) -> None:
        """Until a file exists, or the process has ended."""
        while self._process.is_alive() and not path.exists():
            time.sleep(0.002)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def sniff(output: Path, *arguments: str, fault: Fault = NO_FAULT) -> Command:
    return Command(output, "sniffer.__main__", *arguments, fault=fault)


def runs(output: Path, *arguments: str, fault: Fault = NO_FAULT) -> Command:
    return Command(output, "sniffer.runs.__main__", *arguments, fault=fault)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.driver", "sniffer.capture", "sniffer.runs.verify", "polars", "s3fs"])
    return context


def _child(output: str, module: str, arguments: tuple[str, ...], fault: Fault) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = [module, *arguments]
    _slow_down()
    os.environ.update(fault.environment)
    following.FIRST_WAIT, following.TRIES = 0.01, 2
    if fault.kill_at_step is not None:
        _kill_at(fault.kill_at_step)
    if fault.kill_at_removal is not None:
        _kill_at_removal(fault.kill_at_removal)
    if fault.largest_file is not None:
        _limit_files(fault.largest_file)
    main = __import__(module, fromlist=["main"]).main
    if fault.disk is None:
        sys.exit(main())
    with failing(fault.disk):
        code = main()
    if fault.calls is not None:
        fault.calls.write_text("\n".join(fault.disk.calls))
    sys.exit(code)


def _slow_down() -> None:
    forward = loaded.LoadedBackbone.__call__

    def slower(self: Any, input_ids: Any) -> Any:
        time.sleep(SLOWER)
        return forward(self, input_ids)

    loaded.LoadedBackbone.__call__ = slower  # type: ignore[method-assign]


def _kill_at(step: int) -> None:
    """Kills this process just before its n-th flush or rename: the moments at which a power cut would matter."""
    left = [step]

    def counted(action: Any) -> Any:
        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return action(*arguments)

        return call

    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]


def _kill_at_removal(part: int) -> None:
    left, unlink = [part], Path.unlink

    def counted(self: Path, missing_ok: bool = False) -> None:
        left[0] -= "captures" in self.parts and self.suffix == ".parquet"
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(self, missing_ok=missing_ok)

    Path.unlink = counted  # type: ignore[method-assign]


def _limit_files(largest: int) -> None:
    """Lets writing beyond a size fail, as on a full disk."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
