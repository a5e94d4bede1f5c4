"""When rows are written, and by whom: what a worker that may be lost must not leave half done."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sniffer.engine.crew import Crew
from sniffer.engine.local import LocalPool
from sniffer.engine.pool import BYTES_PER_TOKEN
from sniffer.engine.shift import Shift
from sniffer.process.clock import Clock
from sniffer.runs.verify import verify
from sniffer.storage.store import Store
from sniffer.types import Document, TokenBatch
from tests.helpers_store import FIRST, OUTPUTS, PICKER, Engine, Numbers, Outputs, committing_after, plan

LIMIT = Outputs(memory_limit=1100)


class LosingPool(LocalPool):
    may_lose = True


class Noting(Numbers):
    """Remembers how much each flush was to leave."""

    def flush(self, number: int, leave: float = 0.0):
        self.engine.left.append(leave)
        return super().flush(number, leave)


def at_work(folder: Path, outputs: Outputs, pool: type[LocalPool] = LocalPool, engine: Engine | None = None) -> Shift:
    engine = engine or Engine()
    engine.left = []  # type: ignore[attr-defined]
    crew = Crew(pool(lambda: Noting(folder, engine)), 1, math.inf)
    crew.open()
    store = Store(folder, FIRST, PICKER, "float32")
    store.begin()
    progress = SimpleNamespace(advance=lambda *_: None)
    shift = Shift(crew, plan(outputs), store, Clock(), progress, lambda: None)  # type: ignore[arg-type]
    for batch in engine.batches():
        shift.capture(batch)
        shift.relieve()
    shift.drain()
    return shift


def left(shift: Shift) -> list[float]:
    found: list[float] = shift.crew.members[0].worker.engine.left
    return found


def test_a_worker_in_this_process_leaves_half_of_the_limit(tmp_path: Path):
    with committing_after(1e9):
        shift = at_work(tmp_path, LIMIT)
    assert left(shift) and set(left(shift)) == {550.0}
    assert shift.store.manifest.pending and not shift.store.manifest.parts


def test_one_that_may_be_lost_writes_all_it_holds(tmp_path: Path):
    shift = at_work(tmp_path, LIMIT, LosingPool)
    assert left(shift) and set(left(shift)) == {0.0}
    assert shift.store.manifest.parts and not shift.store.manifest.pending


def test_pending_parts_that_outweigh_the_limit_are_brought_into_sight(tmp_path: Path):
    with committing_after(1):
        shift = at_work(tmp_path, LIMIT)
    assert {0.0, 550.0} == set(left(shift)) and shift.store.manifest.parts


def test_texts_that_are_held_count_as_memory(tmp_path: Path):
    """Of long documents hardly a row is kept, and the documents themselves are what fills the memory."""
    long = [Document(n + 1, str(n), np.zeros(4000, np.int32), False) for n in range(6)]
    outputs = Outputs(memory_limit=3 * 4000 * BYTES_PER_TOKEN)
    shift = at_work(tmp_path, outputs, engine=Engine(long))
    assert 0.0 in left(shift)
    assert shift.crew.members[0].memory <= outputs.memory_limit


@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
def test_after_it_nothing_is_held(tmp_path: Path, outputs: Outputs):
    shift = at_work(tmp_path, outputs)
    shift.finish()
    (member,) = shift.crew.members
    assert (member.held, member.documents, member.tokens, member.rows, member.nbytes) == ([], 0, 0, 0, 0)
    shift.store.complete(last=True)
    shift.store.close({"skipped_empty": 0}, {})
    manifest, problems = verify(tmp_path)
    assert problems == [] and not manifest.pending and manifest.counts["examples"] == 6


def test_a_document_is_held_until_the_manifest_names_it(tmp_path: Path):
    shift = at_work(tmp_path, Outputs())
    (member,) = shift.crew.members
    assert (member.documents, member.tokens) == (6, 124) and member.rows > 0
    assert member.memory == member.nbytes + 124 * BYTES_PER_TOKEN
    assert not any(shift.store.names(batch) for batch in member.held)


def test_what_is_passed_over_is_named_and_not_held(tmp_path: Path):
    shift = at_work(tmp_path, Outputs(), engine=Engine(()))
    batch = next(Engine().batches())
    shift.pass_over(batch)
    assert shift.store.names(batch) and not shift.crew.members[0].held


def test_a_batch_that_the_store_names_in_part_is_not_named(tmp_path: Path):
    store = Store(tmp_path, FIRST, PICKER, "float32")
    one, other = (batch.documents[0] for batch in list(Engine().batches())[:2])
    store.add_examples([one])
    assert store.names(TokenBatch((one,), 0)) and not store.names(TokenBatch((one, other), 0))
