"""`engine=ray`: workers on a Ray cluster, one model each, on this machine or many.

A worker is a Ray actor. Ray finds it a node with room, takes its calls there and says when it is gone; who does which
batch, and what becomes of the rows, is a shift's business (shift.py). Nodes share the file system that the run folder
is on, and have the same packages installed.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sniffer.config.schema import Config, EngineConfig
from sniffer.engine.engine import Engine
from sniffer.engine.generating import loaded_by
from sniffer.engine.pool import WorkerLost
from sniffer.engine.worker import Worker
from sniffer.errors import ConfigError, first_line
from sniffer.process.stop import SIGNALS
from sniffer.types import Checkpoint

log = logging.getLogger(__name__)

REACH_SECONDS = 3.0
OBJECT_STORE = 128 << 20
"""Bytes of shared memory for a cluster of our own: calls carry token ids and reports, never vectors."""


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Staffing:
    """How many workers there are to be, and what each takes."""

    workers: int
    cpus: int
    gpus: float
    per_node: int


class RayEngine(Engine):
    """Connects to a cluster, or starts one on this machine, and leaves it again on `close`."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises ConfigError where Ray is not installed, the cluster is not there, or it has no room."""
        connect(config.address)
        try:
            self._staffing = staffing(config, nodes())
        except ConfigError:
            disconnect()
            raise
        super().__init__(self._staffing.workers, self._staffing.per_node, config.start_timeout)

    def pool(self, config: Config, folder: Path) -> RayPool:
        return RayPool(loaded_by(config), folder, self._staffing)

    def close(self) -> None:
        super().close()
        disconnect()


class RayPool:
    """Workers as Ray actors; `sniffer.engine.pool.Pool`."""

    may_lose = True

    def __init__(self, checkpoint: Checkpoint, folder: Path, staff: Staffing) -> None:
        import ray

        self._ray = ray
        actor: Any = ray.remote(num_cpus=staff.cpus, num_gpus=staff.gpus, max_restarts=0)(Worker)
        self._hire = lambda: actor.remote(checkpoint, folder, staff.cpus)

    def hire(self) -> Any:
        return self._hire()

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        return getattr(worker, method).remote(*arguments)

    def wait(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        if not tickets:
            time.sleep(seconds)
            return []
        _, rest = self._ray.wait(list(tickets), num_returns=1, timeout=seconds)
        if len(rest) == len(tickets):
            return []
        _, rest = self._ray.wait(list(tickets), num_returns=len(tickets), timeout=0)
        waiting = set(rest)
        return [ticket for ticket in tickets if ticket not in waiting]

    def result(self, ticket: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(ticket)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            raise WorkerLost(first_line(error).rstrip(".")) from error

    def dismiss(self, worker: Any) -> None:
        with suppress(Exception):
            self._ray.kill(worker)


def connect(address: str | None) -> None:
    """Joins the cluster at `address` (auto, host:port, ray://...), or starts one of this machine where it is None.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers there.
    """
    if address is not None and not _answers(address):
        raise ConfigError(
            f"engine.address={address}: nothing answers there; `ray start --head` prints the address of a cluster it "
            "starts, and engine.address=auto finds one on this machine"
        )
    # Ray reports its use to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _signals_kept():
        try:
            import ray
        except ImportError as error:
            raise ConfigError("engine=ray needs Ray: pip install 'qk-sniffer[ray]'") from error
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        try:
            ray.init(address=address or "local", **quiet, **(own if address is None else {}))
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            where = (
                "a Ray cluster could not be started on this machine"
                if address is None
                else (f"engine.address={address}: no Ray cluster could be joined there")
            )
            raise ConfigError(f"{where} ({first_line(error).rstrip('.')}); `ray start --head` starts one") from error


def _answers(address: str) -> bool:
    """Whether something listens at host:port; Ray itself would try for minutes. Other addresses are Ray's to judge."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return True
    try:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError):
        return False
    return True


def disconnect() -> None:
    """Leaves the cluster; one that was started here ends."""
    import ray

    with _signals_kept():
        ray.shutdown()


def nodes() -> list[Node]:
    """The machines of the cluster that is connected to."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def staffing(config: EngineConfig, cluster: Sequence[Node]) -> Staffing:
    """How many workers of which size; by default one per GPU, or where there are none, one per node.

    Raises:
        ConfigError: no node has room for even one.
    """
    with_gpus = [node for node in cluster if node.gpus > 0]
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else float(bool(with_gpus))
    usable = [node for node in cluster if node.gpus >= gpus and node.cpus >= (config.cpus_per_worker or 1)]
    if not usable:
        raise ConfigError(
            f"no node of the cluster has {config.cpus_per_worker or 1} CPUs and {gpus:g} GPUs for a worker: "
            "lower engine.cpus_per_worker or engine.gpus_per_worker"
        )
    default = sum(int(node.gpus // gpus) for node in usable) if gpus else len(usable)
    workers = config.workers or default
    per_node = math.ceil(workers / len(usable))
    cpus = config.cpus_per_worker or max(1, int(min(node.cpus for node in usable) // per_node))
    room = sum(int(min(node.cpus // cpus, node.gpus // gpus if gpus else math.inf)) for node in usable)
    if room < workers:
        log.warning("the cluster has room for %d of %d workers now: the others begin when there is more", room, workers)
    return Staffing(workers, cpus, gpus, per_node)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; ours stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
