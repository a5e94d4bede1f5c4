"""A crew: workers that come and go, and what they answer. What they are to capture is a shift's business (shift.py).

    hired       a worker is asked to load the model; it may begin later, when there is room for it
    welcome     it has its model, which must be the first one's, and takes the plan, if there is one already
    lost        it is let go of; whoever listens gets what it had in hand, and another worker its place

Who the workers are, and how one talks to them, is the `Pool`'s business (local.py, ray.py).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sniffer.engine.base import Plan
from sniffer.engine.facts import Facts
from sniffer.engine.pool import WRITE, Member, Pool, WorkerLost, name_of
from sniffer.engine.worker import Flushed, Report
from sniffer.errors import CaptureError
from sniffer.process.environment import versions
from sniffer.storage.same_run import VERSIONS, differences
from sniffer.types import TokenBatch

log = logging.getLogger(__name__)

MOST_LOSSES = 3
"""Workers lost over one batch, or one after the other with nothing kept in between, before the run gives up."""

PATIENCE = 0.5
"""Seconds between looks at whether the user wants to stop."""


@dataclass(frozen=True)
class Captured:
    """A batch is through the model."""

    member: Member
    batch: TokenBatch
    report: Report


@dataclass(frozen=True)
class Written:
    """A worker has written rows that it held."""

    member: Member
    flushed: Flushed


@dataclass(frozen=True)
class Lost:
    """A worker is gone, with all that it had in hand."""

    member: Member


News = Captured | Written | Lost


class Crew:
    """`size` workers of a pool, each replaced when it is lost. `model` is the first one's."""

    def __init__(self, pool: Pool, size: int, start_timeout: float) -> None:
        self.pool = pool
        self.size = size
        self.start_timeout = start_timeout
        self.members: list[Member] = []
        self.model: Facts | None = None
        self._plan: Plan | None = None
        self._losses: Counter[int | None] = Counter()
        self._last_sign = time.monotonic()
        for _ in range(size):
            self._hire()

    def open(self) -> Facts:
        """Waits for the first worker that has its model; the others may come later.

        Raises:
            CaptureError: no worker could be started, or they were lost one after the other.
            SnifferError: as `Worker.open`.
        """
        while self.model is None:
            for _ in self.news():
                pass
        return self.model

    def begin(self, plan: Plan) -> None:
        """Tells all workers what is to be captured, those that come later too."""
        self._plan = plan
        for member in self.ready:
            self.call(member, "begin", plan)

    def close(self) -> None:
        for member in self.members:
            self.pool.dismiss(member.worker)
        self.members = []

    @property
    def ready(self) -> list[Member]:
        """Those who have their models."""
        return [member for member in self.members if member.facts is not None]

    def call(self, member: Member, method: str, *arguments: Any, of: TokenBatch | None = None) -> None:
        member.calls[self.pool.call(member.worker, method, *arguments)] = (method, of)

    def news(self, seconds: float = PATIENCE, *, replace: bool = True) -> Iterator[News]:
        """What workers have answered; waits up to `seconds` for the first answer.

        Args:
            replace: whether those who are lost are.

        Raises:
            CaptureError: workers are lost too often, none has its model, or one has another model or versions.
            Exception: what a worker raised.
        """
        owner = {ticket: member for member in self.members for ticket in member.calls}
        for ticket in self.pool.wait(list(owner), seconds):
            member = owner[ticket]
            # Three calls of one lost worker end together: the first says that it is lost, the others say nothing new.
            if member not in self.members:
                continue
            self._last_sign = time.monotonic()
            try:
                answer = self.pool.result(ticket)
            except WorkerLost as lost:
                # What it was running may be why.
                blamed = member.running[0] if member.running else None
                self.members.remove(member)
                self.pool.dismiss(member.worker)  # it may be out of reach rather than gone
                log.warning("a worker was lost (%s); others get what it had in hand", lost)
                yield Lost(member)
                self._count_loss(blamed, lost)
                if replace:
                    self._hire()
                continue
            except Exception:
                del member.calls[ticket]
                raise
            method, batch = member.calls.pop(ticket)
            if method == "open":
                self._welcome(member, answer)
            if method == "run" and batch is not None:
                yield Captured(member, batch, answer)
            if method in WRITE:
                yield Written(member, answer)
        self._require_someone()

    def forgive(self) -> None:
        """Something was kept: losses without anything to blame count anew."""
        self._losses[None] = 0

    def _count_loss(self, blamed: TokenBatch | None, lost: WorkerLost) -> None:
        """Raises CaptureError where there were too many losses.

        Without anything to blame, a whole node may be gone, with many workers.
        """
        key, most = (blamed.documents[0].example_id, MOST_LOSSES) if blamed else (None, MOST_LOSSES * self.size)
        self._losses[key] += 1
        if self._losses[key] >= most:
            during = f"over {name_of(blamed)}" if blamed else "while they loaded the model or wrote"
            raise CaptureError(
                f"{self._losses[key]} workers were lost {during} (the last one: {lost}): if memory ran out, "
                "lower batch.max_tokens, output.memory_limit or engine.workers"
            )

    def _welcome(self, member: Member, facts: Facts) -> None:
        """A worker has its model.

        Raises:
            CaptureError: it runs other versions than this process, or has another model than the first one.
        """
        here = versions()
        for name in VERSIONS:
            if facts.versions.get(name) != here.get(name):
                raise CaptureError(
                    f"a worker has {name} {facts.versions.get(name, 'not installed')}, this process "
                    f"{here.get(name, 'not installed')}: install the same on all nodes"
                )
        if self.model is not None and (facts.geometry, facts.dtype) != (self.model.geometry, self.model.dtype):
            raise CaptureError("two workers have different models: let model.checkpoint be the same on all nodes")
        if self.model is not None and (found := differences(_of_model(self.model), _of_model(facts))):
            raise CaptureError(f"two workers have different models: {'; '.join(found)}; let all nodes have the same")
        if self.model is not None and (found := differences(_of_device(self.model), _of_device(facts))):
            log.warning("workers compute on different devices, and so round differently: %s", "; ".join(found))
        member.facts = facts
        self.model = self.model or facts
        if self.pool.may_lose:
            who = f"{len(self.ready)} of {len(self.members)}"
            log.info("worker %s is ready: process %d, %s", who, facts.process, facts.device.type)
        if self._plan is not None:
            self.call(member, "begin", self._plan)

    def _require_someone(self) -> None:
        """Raises CaptureError where no worker has shown a sign of life for too long, and none is at work."""
        if not self.ready and time.monotonic() - self._last_sign > self.start_timeout:
            raise CaptureError(
                f"no worker has its model after {self.start_timeout:g} seconds: is there room for one on the cluster "
                "(engine.cpus_per_worker, engine.gpus_per_worker), or does loading take longer (engine.start_timeout)?"
            )

    def _hire(self) -> None:
        member = Member(self.pool.hire())
        self.members.append(member)
        self.call(member, "open")


def _of_device(facts: Facts) -> dict[str, Any]:
    return {"device": facts.described}


def _of_model(facts: Facts) -> dict[str, Any]:
    """What a worker's vectors depend on besides its device and versions, as a manifest has it."""
    return {"model": facts.model, "backbone": facts.backbone}
