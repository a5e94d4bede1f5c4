"""A crew: workers, and the batches they have in hand.

    a batch is handed to whichever worker is free
    a worker that holds enough writes its rows, as parts that the manifest then names, with their documents
    the batches of a worker that is lost go to others: all those whose documents the manifest does not name

So every document is in the manifest once, whatever becomes of workers, and its rows are those that one process
would have captured. Who the workers are, and how one talks to them, is the `Pool`'s business (ray.py).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from sniffer.dataset.feed import Feed
from sniffer.engine.base import Plan
from sniffer.engine.pool import Hand, Pool, WorkerLost, name_of
from sniffer.engine.worker import Facts, Flushed, Report
from sniffer.errors import CaptureError
from sniffer.forward.observer import draw
from sniffer.process.clock import Clock
from sniffer.process.environment import versions
from sniffer.process.stop import Stop
from sniffer.storage.same_run import VERSIONS, differences
from sniffer.storage.store import Store
from sniffer.terminal.progress import CaptureProgress, capture_progress
from sniffer.types import TokenBatch

log = logging.getLogger(__name__)

AHEAD = {"cpu": 1}
"""Batches that a worker has in hand at a time, by device; a GPU is to find the next one waiting."""

MOST_LOSSES = 3
"""Workers lost over one batch, or one after the other with nothing kept in between, before the run gives up."""

PATIENCE = 0.5
"""Seconds between looks at whether the user wants to stop."""


class Crew:
    """`size` workers of a pool, each replaced when it is lost."""

    def __init__(self, pool: Pool, size: int, start_timeout: float) -> None:
        self.pool = pool
        self.size = size
        self.start_timeout = start_timeout
        self.hands: list[Hand] = []
        self.model: Facts | None = None
        self.plan: Plan | None = None
        self._todo: deque[TokenBatch] = deque()
        self._losses: Counter[int | None] = Counter()
        self._flushed_rows = 0
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
            self._listen()
        return self.model

    def infer(self, plan: Plan, feed: Feed, store: Store, clock: Clock, stop: Stop) -> None:
        """Has every batch captured, and what was captured named by the store.

        Raises:
            CaptureError: as `open`, or a batch was lost with several workers.
            Stopped: a signal came.
            SnifferError: what a worker raised.
        """
        self._begin(plan)
        with capture_progress(feed.expected_documents, feed.expected_tokens) as progress:
            source = stop.each(self._wanted(plan, feed, store, progress))
            while True:
                self._hand_out(source, store)
                if not self._todo and not any(hand.running or hand.flushing for hand in self.hands):
                    if any(hand.held for hand in self.hands):
                        self._flush(store, self.hands)
                    elif any(hand.facts is not None for hand in self.hands):
                        return  # someone was free, and there was nothing to hand out
                self._listen(store, clock, progress)
                self._relieve(store)
                stop.check()

    def finish(self, store: Store, clock: Clock) -> None:
        """After an interruption: has what workers hold written, batches in progress included."""
        self._todo.clear()
        self._flush(store, self.hands)
        while any(hand.calls for hand in self.hands if hand.held or hand.flushing):
            with suppress(Exception):  # the interruption is told already; the others may still have rows
                self._listen(store, clock, hire=False)

    def close(self) -> None:
        for hand in self.hands:
            self.pool.dismiss(hand.worker)
        self.hands = []

    def _wanted(self, plan: Plan, feed: Feed, store: Store, progress: CaptureProgress) -> Iterator[TokenBatch]:
        """The batches of which some row is not on disk yet."""
        for batch in feed.batches(plan.batch_tokens, plan.lengths):
            if store.kept.committed or store.kept.pending:
                picks = draw(plan.picker, plan.selection, batch)
                if not store.kept.lacks(batch, picks, plan.selection.heads):
                    store.add_examples(batch.documents)
                    progress.advance(len(batch.documents), batch.n_tokens, self._rows)
                    continue
            yield batch

    def _hand_out(self, source: Iterator[TokenBatch], store: Store) -> None:
        """Gives batches to workers, one each before any gets a second."""
        assert self.plan is not None and self.model is not None
        ahead = AHEAD.get(self.model.device.type, 2)
        for depth in range(ahead):
            for hand in self.hands:
                if hand.facts is None or len(hand.running) > depth:
                    continue
                batch = self._todo.popleft() if self._todo else next(source, None)
                if batch is None:
                    return
                done = store.kept.done(batch, self.plan.selection.heads)
                self._call(hand, "run", batch, done, of=batch)

    def _relieve(self, store: Store) -> None:
        """Has rows written that were in memory for long enough, or are too much for it."""
        documents = sum(len(batch.documents) for hand in self.hands for batch in hand.held)
        if store.checkpoint_every is not None and documents >= store.checkpoint_every:
            self._flush(store, self.hands)
        self._flush(store, [hand for hand in self.hands if hand.nbytes > store.memory_limit])

    def _flush(self, store: Store, hands: Sequence[Hand]) -> None:
        for hand in hands:
            if (hand.held or hand.running) and not hand.flushing:
                self._call(hand, "flush", store.next_number())

    def _listen(
        self,
        store: Store | None = None,
        clock: Clock | None = None,
        progress: CaptureProgress | None = None,
        *,
        hire: bool = True,
    ) -> None:
        """Waits for an answer, a little while, and takes it in."""
        owner = {ticket: hand for hand in self.hands for ticket in hand.calls}
        for ticket in self.pool.wait(list(owner), PATIENCE):
            hand = owner[ticket]
            if hand not in self.hands:
                continue
            self._last_sign = time.monotonic()
            method, batch = hand.calls[ticket]
            try:
                answer = self.pool.result(ticket)
            except WorkerLost as lost:
                self._lose(hand, lost, store, progress, hire=hire)
                continue
            except Exception:
                del hand.calls[ticket]
                raise
            del hand.calls[ticket]
            self._take_in(hand, method, batch, answer, store, clock, progress)
        self._require_someone()

    def _take_in(
        self,
        hand: Hand,
        method: str,
        batch: TokenBatch | None,
        answer: Any,
        store: Store | None,
        clock: Clock | None,
        progress: CaptureProgress | None,
    ) -> None:
        if method == "open":
            self._welcome(hand, answer)
        if method == "run":
            assert isinstance(answer, Report) and batch is not None and store is not None and clock is not None
            if not _named(batch, store):
                hand.held.append(batch)
                hand.rows, hand.nbytes = answer.rows, answer.nbytes
            clock.add_all(answer.seconds)
            if progress is not None:
                progress.advance(len(batch.documents), batch.n_tokens, self._rows)
        if method == "flush":
            assert isinstance(answer, Flushed) and store is not None and clock is not None
            self._adopt(hand, answer, store)
            clock.add_all({stage: s for stage, s in answer.seconds.items() if stage != "commit"})

    def _adopt(self, hand: Hand, answer: Flushed, store: Store) -> None:
        # The rows have left the worker, whatever becomes of the store.
        flushed = {example.example_id for example in answer.examples}
        hand.held = [batch for batch in hand.held if not {d.example_id for d in batch.documents} <= flushed]
        hand.rows = hand.nbytes = 0
        self._flushed_rows += answer.rows
        self._losses[None] = 0
        store.adopt(answer.parts, answer.examples, whole=answer.whole)
        if answer.failure is not None:
            raise answer.failure

    def _welcome(self, hand: Hand, facts: Facts) -> None:
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
        hand.facts = facts
        self.model = self.model or facts
        ready = sum(other.facts is not None for other in self.hands)
        log.info("worker %d of %d is ready: process %d, %s", ready, len(self.hands), facts.process, facts.device.type)
        if self.plan is not None:
            self._call(hand, "begin", self.plan)

    def _begin(self, plan: Plan) -> None:
        self.plan = plan
        for hand in self.hands:
            if hand.facts is not None:
                self._call(hand, "begin", plan)

    def _lose(
        self, hand: Hand, lost: WorkerLost, store: Store | None, progress: CaptureProgress | None, *, hire: bool
    ) -> None:
        """A worker is gone: others get its batches, and another worker its place.

        Raises:
            CaptureError: that has happened too often.
        """
        self.hands.remove(hand)
        self.pool.dismiss(hand.worker)  # it may be out of reach rather than gone
        again = [batch for batch in (*hand.held, *hand.running) if store is None or not _named(batch, store)]
        self._todo.extendleft(reversed(again))
        if progress is not None:
            for batch in hand.held:
                progress.advance(-len(batch.documents), -batch.n_tokens, self._rows)
        log.warning("a worker was lost (%s): %d batches go to others", lost, len(again))
        # What it was running may be why. Without anything to blame, a whole node may be gone, with many workers.
        blamed = hand.running[0] if hand.running else None
        key, most = (blamed.documents[0].example_id, MOST_LOSSES) if blamed else (None, MOST_LOSSES * self.size)
        self._losses[key] += 1
        if self._losses[key] >= most:
            during = f"over {name_of(blamed)}" if blamed else "while they loaded the model or wrote"
            raise CaptureError(
                f"{self._losses[key]} workers were lost {during} (the last one: {lost}): if memory ran out, "
                "lower batch.max_tokens, output.memory_limit or engine.workers"
            )
        if hire:
            self._hire()

    def _require_someone(self) -> None:
        """Raises CaptureError where no worker has shown a sign of life for too long, and none is at work."""
        at_work = any(hand.facts is not None for hand in self.hands)
        if not at_work and time.monotonic() - self._last_sign > self.start_timeout:
            raise CaptureError(
                f"no worker has its model after {self.start_timeout:g} seconds: is there room for one on the cluster "
                "(engine.cpus_per_worker, engine.gpus_per_worker), or does loading take longer (engine.start_timeout)?"
            )

    def _hire(self) -> None:
        hand = Hand(self.pool.hire())
        self.hands.append(hand)
        self._call(hand, "open")

    def _call(self, hand: Hand, method: str, *arguments: Any, of: TokenBatch | None = None) -> None:
        hand.calls[self.pool.call(hand.worker, method, *arguments)] = (method, of)

    @property
    def _rows(self) -> int:
        """Captured in all, as far as is known."""
        return self._flushed_rows + sum(hand.rows for hand in self.hands)


def _named(batch: TokenBatch, store: Store) -> bool:
    """Whether the manifest has the batch's documents."""
    return all(document.example_id in store.examples for document in batch.documents)


def _of_model(facts: Facts) -> dict[str, Any]:
    """What a worker's vectors depend on besides its device and versions, as a manifest has it."""
    return {"model": facts.model, "backbone": facts.backbone}
