"""Where workers come from, and what each has in hand."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Protocol

from sniffer.engine.facts import Facts
from sniffer.types import TokenBatch

BYTES_PER_TOKEN = 4
"""Of the texts that are held until their rows are named."""

WRITE = ("flush", "spill")
"""Calls that have a worker write; while it spills, it may run batches."""

Ticket = Hashable
"""Of a call that a worker was asked to do."""


class WorkerLost(Exception):  # noqa: N818 - what happens to a worker is no error of the run
    """A worker's process or machine is gone; the text says how."""


class Pool(Protocol):
    """Where workers come from. A worker does what it is called for one by one, in order.

    `may_lose`: a worker can be gone while this process lives on.
    """

    may_lose: bool

    def hire(self) -> Any:
        """A new worker; it may begin later, when there is room for it."""

    def call(self, worker: Any, method: str, *arguments: Any) -> Ticket:
        """Asks a `sniffer.engine.worker.Worker` to do something."""

    def wait(self, tickets: Sequence[Ticket], seconds: float) -> Sequence[Ticket]:
        """Those of the calls that have ended, in the order given; waits up to `seconds` for the first."""

    def result(self, ticket: Ticket) -> Any:
        """What a call that has ended returned, or raises what it raised; WorkerLost if there is no one to ask."""

    def dismiss(self, worker: Any) -> None:
        """Ends a worker, wherever it is in its work."""


@dataclass(eq=False)
class Member:
    """A worker of a crew, and what it has in hand.

    `calls` are what it was asked and has not answered: the method, and for `run` the batch. `held` are batches
    whose rows it holds in memory, `documents` and `tokens` what these have, `rows` and `nbytes` what was captured of
    them; of these documents `leaving_documents` are being written, and beside these bytes `leaving`. `facts` it tells
    once it has its model.
    """

    worker: Any
    calls: dict[Ticket, tuple[str, TokenBatch | None]] = field(default_factory=dict)
    held: list[TokenBatch] = field(default_factory=list)
    facts: Facts | None = None
    documents: int = 0
    tokens: int = 0
    rows: int = 0
    nbytes: int = 0
    leaving: int = 0
    leaving_documents: int = 0

    @property
    def running(self) -> list[TokenBatch]:
        return [batch for _, batch in self.calls.values() if batch is not None]

    @property
    def flushing(self) -> bool:
        return any(method in WRITE for method, _ in self.calls.values())

    @property
    def memory(self) -> int:
        """Bytes: what was captured, and the texts that it is of; but what is being written."""
        return self.nbytes + BYTES_PER_TOKEN * self.tokens

    def hold(self, batch: TokenBatch) -> None:
        self.held.append(batch)
        self.documents += len(batch.documents)
        self.tokens += batch.n_tokens

    def let_go(self, example_ids: AbstractSet[int]) -> None:
        """Of the batches whose documents all are among these."""
        self.held = [batch for batch in self.held if any(d.example_id not in example_ids for d in batch.documents)]
        self.documents = sum(len(batch.documents) for batch in self.held)
        self.tokens = sum(batch.n_tokens for batch in self.held)


def name_of(batch: TokenBatch) -> str:
    first = batch.documents[0]
    more = f" and {len(batch.documents) - 1} more" if len(batch.documents) > 1 else ""
    return f"document {first.source_id!r}{more} ({batch.padded_tokens:,} tokens)"
