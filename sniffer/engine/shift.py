"""A shift: a crew at one run. Batches go to whoever is free, and rows come back as parts that the manifest names.

    a batch is handed to a worker, which then *runs* it, and *holds* its rows in memory
    a worker that holds enough *flushes*: it writes its rows as parts, which the store then names, with their documents
    what a lost worker had in hand goes to others: all batches whose documents the manifest does not name

So every document is in the manifest once, whatever becomes of workers, and its rows are those that one process
would have captured.

Beyond its memory limit a worker flushes all it holds. One in this process, which cannot be lost while the run lives,
*spills* instead: it writes the largest (layer, kind) pairs until half of the limit is left, so that pairs with few
heads get few, large parts. These stay pending, for their documents have rows of other pairs in memory still. An
example, with a limit of 100 MB, q of 32 heads and k of 8: at 100 MB q has 80 of them; q leaves, 20 MB of k stay, and k
leaves when it has outgrown q. Once pending parts outweigh the limit COMMIT_AFTER times, all is flushed, and counts.

Where a GPU runs the model of this process, it goes on meanwhile: what is written is set aside, threads are at it, and
batches are captured beside them. What is set aside counts as memory, so it begins at three quarters of the limit and
leaves a quarter: half of the limit is written, as above, and a quarter is there to capture into. Beyond the limit, and
where the next is to be written before the last one is, the threads are waited for. Which rows lie in which part does
not depend on how fast they are. On a processor they would take the cores of the model, and it waits for them at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from sniffer.engine.base import Plan
from sniffer.engine.crew import PATIENCE, Captured, Crew, Lost, News, Written
from sniffer.engine.pool import BYTES_PER_TOKEN, Member
from sniffer.engine.worker import Flushed
from sniffer.forward.estimate import COMMIT_AFTER
from sniffer.process.clock import Clock
from sniffer.storage.store import Store
from sniffer.terminal.progress import CaptureProgress
from sniffer.types import TokenBatch

BEGIN, LEAVE = 0.75, 0.25
"""Shares of the memory limit: beyond the first, rows are written beside the model until the second is left."""

AHEAD = {"cpu": 1}
"""Batches that a worker has in hand at a time, by device; a GPU is to find the next one waiting."""


class Shift:
    """The crew's work on one run.

    Args:
        check: called while workers are waited for; raises what ends the run.
    """

    def __init__(
        self,
        crew: Crew,
        plan: Plan,
        store: Store,
        clock: Clock,
        progress: CaptureProgress,
        check: Callable[[], object],
    ) -> None:
        assert crew.model is not None
        self.crew = crew
        self.plan = plan
        self.store = store
        self.clock = clock
        self.progress = progress
        self.check = check
        self._ahead = AHEAD.get(crew.model.device.type, 2)
        self._beside = not crew.pool.may_lose and crew.model.device.type != "cpu"
        self._todo: deque[TokenBatch] = deque()
        self._named_rows = 0
        crew.begin(plan)

    def capture(self, batch: TokenBatch) -> None:
        """Has a batch captured: returns once a worker has it.

        Raises:
            CaptureError: workers were lost too often.
            SnifferError: what a worker raised.
        """
        self.store.tokens.add(batch.documents)
        self._todo.append(batch)
        self._hand_out()
        while self._todo:
            self._go_on()

    def pass_over(self, batch: TokenBatch) -> None:
        """All rows of a batch are on disk already."""
        self.store.add_examples(batch.documents)
        self.store.tokens.add(batch.documents)
        self._advance(batch)

    def relieve(self) -> None:
        """Has rows written that were in memory for long enough, or are too much for it.

        Raises:
            CaptureError: the disk is full or cannot be written to; or as `capture`.
        """
        self._listen(0.0)
        if self._relieve():
            self._listen(0.0)

    def drain(self) -> None:
        """Waits until every batch is through the model; raises as `capture`."""
        self._hand_out()
        while self._todo or any(member.running for member in self.crew.ready):
            self._go_on()

    def finish(self) -> None:
        """Has everything written; what a worker takes with it at the very end is captured again.

        Raises:
            CaptureError: as `relieve`.
        """
        while any(member.held or member.flushing for member in self.crew.members):
            self._flush(self.crew.members)
            self._listen()
            if self._todo:
                self.drain()

    def rescue(self) -> None:
        """After an interruption: has what workers hold written, batches in progress included, as far as it goes.

        What stopped the run is told already; others may still have rows.
        """
        self._todo.clear()
        # Who is at it already may hold newer rows, for which it is asked once it has ended.
        for _ in range(1 + any(member.flushing for member in self.crew.members)):
            self._flush(self.crew.members)
            while any(member.calls for member in self.crew.members if member.held or member.flushing):
                with suppress(Exception):
                    self._listen(replace=False)

    def _go_on(self) -> None:
        """Waits for news, and does what follows from them."""
        self._listen()
        self._relieve()
        self.check()
        self._hand_out()

    def _hand_out(self) -> None:
        """Gives batches to workers, one each before any gets a second."""
        for depth in range(self._ahead):
            # Of two workers, the first has a batch: the next batch goes to the other one, even if a GPU may have two.
            for member in self.crew.ready:
                if self._todo and len(member.running) <= depth:
                    batch = self._todo.popleft()
                    self.crew.call(member, "run", batch, self.store.done(batch), of=batch)

    def _relieve(self) -> bool:
        """Asks workers to write; whether any was asked."""
        every, limit, members = self.plan.checkpoint_every, self.plan.memory_limit, self.crew.members
        if self._beside:
            (member,) = members
            return self._relieve_beside(member)
        if every is not None and sum(member.documents for member in members) >= every:
            return self._flush(members)
        large = [member for member in members if member.memory > limit]
        return self._flush(large, leave=limit / 2 if large and self._may_spill(large[0]) else 0.0)

    def _relieve_beside(self, member: Member) -> bool:
        """Has the worker of this process write while it goes on; waits where the last writing has to end first."""
        asked = False
        if self._due(member):
            # Whether it still is, with what was written out of the way, is the same however long that takes.
            self._wait_for_writers(member)
            if asked := self._due(member):
                spill = not self._checkpoint_due(member) and self._may_spill(member)
                member.leaving_documents = 0 if spill else member.documents
                leave = LEAVE * self.plan.memory_limit if spill else 0.0
                self.crew.call(member, "spill", self.store.next_number(), leave)
        if member.memory + member.leaving > self.plan.memory_limit:
            self._wait_for_writers(member)
        return asked

    def _due(self, member: Member) -> bool:
        return self._checkpoint_due(member) or member.memory > BEGIN * self.plan.memory_limit

    def _checkpoint_due(self, member: Member) -> bool:
        every = self.plan.checkpoint_every
        return every is not None and member.documents - member.leaving_documents >= every

    def _wait_for_writers(self, member: Member) -> None:
        while member.flushing:
            self._listen()
            self.check()

    def _may_spill(self, member: Member) -> bool:
        pending = sum(part.bytes for part in self.store.manifest.pending)
        texts = BYTES_PER_TOKEN * member.tokens
        limit = self.plan.memory_limit
        return not self.crew.pool.may_lose and pending <= COMMIT_AFTER * limit and texts <= limit / 2

    def _flush(self, members: Iterable[Member], leave: float = 0.0) -> bool:
        """Asks those to write who have something and are not at it yet: all of it, but the last `leave` bytes."""
        asked = [member for member in members if (member.held or member.running) and not member.flushing]
        for member in asked:
            self.crew.call(member, "flush", self.store.next_number(), leave)
        return bool(asked)

    def _listen(self, seconds: float = PATIENCE, *, replace: bool = True) -> None:
        for news in self.crew.news(seconds, replace=replace):
            self._take_in(news)

    def _take_in(self, news: News) -> None:
        match news:
            case Captured(member, batch, report):
                # Asked to write while it ran this batch, the worker may have told of that first: the rows are named.
                if not self.store.names(batch):
                    member.hold(batch)
                    member.rows, member.nbytes, member.leaving = report.rows, report.nbytes, report.leaving
                self.clock.add_all(report.seconds)
                self.store.manifest = self.store.manifest.apart_by(report.differences)
                self._advance(batch)
            case Written(member, flushed):
                # Seconds of writing are the driver's while it waits for them, and nobody's while it does not.
                self.clock.add_all(flushed.seconds)
                self._adopt(member, flushed)
            case Lost(member):
                again = [batch for batch in (*member.held, *member.running) if not self.store.names(batch)]
                # They were next before those that wait: [1, 2] before [3] is [1, 2, 3] again.
                self._todo.extendleft(reversed(again))
                for batch in member.held:
                    self._advance(batch, -1)

    def _adopt(self, member: Member, flushed: Flushed) -> None:
        """Has the store name what a worker has written; raises what kept it from writing the rest."""
        member.nbytes, member.leaving, member.leaving_documents = flushed.nbytes, 0, 0
        if flushed.whole:
            # The rows have left the worker, whatever becomes of the store.
            member.let_go({example.example_id for example in flushed.examples})
            member.rows = 0
            self._named_rows += flushed.rows
            self.crew.forgive()
        self.store.adopt(flushed.parts, flushed.examples, whole=flushed.whole, moments=flushed.moments)
        if flushed.failure is not None:
            raise flushed.failure

    def _advance(self, batch: TokenBatch, sign: int = 1) -> None:
        rows = self._named_rows + sum(member.rows for member in self.crew.members)
        self.progress.advance(sign * len(batch.documents), sign * batch.n_tokens, rows)
