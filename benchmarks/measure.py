"""Repeats, medians and peak memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil

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


def resident(command: Sequence[str]) -> list[int]:
    """Runs a Python command in a child process; its resident bytes, looked at every 20 ms."""
    root = Path(__file__).resolve().parents[1]
    samples: list[int] = []
    with subprocess.Popen([sys.executable, *command], cwd=root, stdout=subprocess.DEVNULL) as child:
        watched = psutil.Process(child.pid)
        while child.poll() is None:
            with suppress(psutil.NoSuchProcess):
                samples.append(watched.memory_info().rss)
            time.sleep(0.02)
    if child.returncode:
        raise SystemExit(f"benchmark run failed: python {' '.join(command)}")
    return samples
