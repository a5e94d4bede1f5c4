"""Repeats, medians, whole runs as child processes, and what was measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import psutil

P = ParamSpec("P")
T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Figure:
    """One row of the table: the median of `n` measurements, their spread, and the limit it is held to, if any."""

    name: str
    value: float
    low: float
    high: float
    limit: float | None = None
    unit: str = ""
    n: int = 1

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.value <= self.limit


def figure(name: str, values: Sequence[float], *, limit: float | None = None, unit: str = "") -> Figure:
    return Figure(name, statistics.median(values), min(values), max(values), limit, unit, len(values))


@dataclass
class Timed:
    """Wall and processor seconds of one call, or of several together; or one such pair over another."""

    wall: float = 0.0
    cpu: float = 0.0

    def __iadd__(self, other: Timed) -> Timed:
        self.wall, self.cpu = self.wall + other.wall, self.cpu + other.cpu
        return self

    def __truediv__(self, other: Timed) -> Timed:
        return Timed(self.wall / other.wall, self.cpu / other.cpu)


def both(
    name: str, values: Sequence[Timed], *, limit: float | None = None, cpu_limit: float | None = None
) -> list[Figure]:
    """Two figures: by the clock, and in processor time."""
    return [
        figure(name, [one.wall for one in values], limit=limit),
        figure(f"{name}, processor time", [one.cpu for one in values], limit=cpu_limit),
    ]


def timed(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, Timed]:
    """What a call returns, and the seconds it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(*args, **kwargs)
    return result, Timed(time.perf_counter() - wall, time.process_time() - cpu)


@dataclass(frozen=True)
class Child:
    """A Python process that has ended: its seconds, and its resident bytes, looked at every 20 ms."""

    spent: Timed
    resident: tuple[int, ...]

    @property
    def peak(self) -> int:
        return max(self.resident)

    @property
    def steady(self) -> float:
        """Resident bytes over the second half, which leaves out the moment at which weights are read."""
        return statistics.median(self.resident[len(self.resident) // 2 :])


def child(*command: str, environment: Mapping[str, str] = MappingProxyType({})) -> Child:
    """Runs a Python command to its end, with more in its environment.

    Raises:
        SystemExit: it failed.
    """
    resident: list[int] = []
    started = time.perf_counter()
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with subprocess.Popen(
        [sys.executable, *command], env=whole, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        watched = psutil.Process(process.pid)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            with suppress(psutil.NoSuchProcess):
                resident.append(watched.memory_info().rss)
            time.sleep(0.02)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"benchmark run failed: python {' '.join(command)}\n{process.stderr.read()}")
    return Child(Timed(wall, usage.ru_utime + usage.ru_stime), tuple(resident))


@dataclass(frozen=True)
class WholeRun:
    """One `python -m sniffer`, and what its manifest says."""

    child: Child
    manifest: dict[str, Any]

    @property
    def seconds(self) -> dict[str, float]:
        """By stage: load, inference, sample, forward, capture, write."""
        return dict(self.manifest["timings"])

    @property
    def captured_bytes(self) -> int:
        """Of all captured values as float32."""
        dims = {layer["layer"]: layer["dims"] for layer in self.manifest["geometry"]}
        return sum(4 * part["rows"] * dims[part["layer"]][part["kind"]] for part in self.manifest["parts"])


def whole_run(folder: Path, *overrides: str, environment: Mapping[str, str] = MappingProxyType({})) -> WholeRun:
    """Captures into `folder`, by the command line; `environment` as in `child`.

    Raises:
        SystemExit: the run failed.
    """
    ended = child("-m", "sniffer", *overrides, f"hydra.run.dir={folder}", environment=environment)
    return WholeRun(ended, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the straight line through the logarithms: 1 is proportional growth, 2 quadratic."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def circumstances() -> dict[str, Any]:
    """What the figures were measured on, without naming the machine."""
    import torch

    packages = ("torch", "transformers", "pyarrow", "polars", "numpy")
    return {
        "at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
