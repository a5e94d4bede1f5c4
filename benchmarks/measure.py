"""Repeats, medians and peak memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One row of the table: a median, its spread, and the limit it is held to, if any."""

    name: str
    value: float
    low: float
    high: float
    limit: float | None = None
    unit: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.value <= self.limit


def figure(name: str, values: Sequence[float], *, limit: float | None = None, unit: str = "") -> Figure:
    return Figure(name, statistics.median(values), min(values), max(values), limit, unit)


@dataclass
class Timed:
    """Wall and processor seconds of one call."""

    wall: float
    cpu: float


def timed(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, Timed]:
    """What a call returns, and the seconds it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(*args, **kwargs)
    return result, Timed(time.perf_counter() - wall, time.process_time() - cpu)


def peak_rss(command: Sequence[str], cwd: Path) -> int:
    """Runs a Python command in a child process and returns its peak resident memory in bytes."""
    with subprocess.Popen([sys.executable, *command], cwd=cwd, stdout=subprocess.DEVNULL) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"benchmark run failed: python {' '.join(command)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
