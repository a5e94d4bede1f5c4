"""When rows are written, and by whom: what a worker that may be lost must not leave half done."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sniffer.engine.crew import Crew
from sniffer.engine.local import LocalPool
from sniffer.engine.pool import BYTES_PER_TOKEN
from sniffer.engine.shift import Shift
from sniffer.engine.worker import Report
from sniffer.errors import CaptureError
from sniffer.process.clock import Clock
from sniffer.runs.verify import verify
from sniffer.storage import part_writer
from sniffer.storage.manifest import Manifest
from sniffer.storage.part_writer import PartWriter
from sniffer.storage.schema import Part
from sniffer.storage.store import Store
from sniffer.types import Document, TokenBatch
from tests.helpers_store import (
    DIM,
    DOCUMENTS,
    FIRST,
    OUTPUTS,
    PICKER,
    SELECTION,
    Engine,
    Numbers,
    Outputs,
    committing_after,
    plan,
    run,
    vectors,
)

LIMIT = Outputs(memory_limit=1100)


class LosingPool(LocalPool):
    may_lose = True


class Noting(Numbers):
    """Remembers how much each flush was to leave."""

    def begin_flush(self, number: int, leave: float = 0.0):
        self.engine.left.append(leave)
        return super().begin_flush(number, leave)


def at_work(folder: Path, outputs: Outputs, pool: type[LocalPool] = LocalPool, engine: Engine | None = None) -> Shift:
    engine = engine or Engine()
    engine.device = "cuda" if outputs.gpu else "cpu"
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


BESIDE = Outputs(memory_limit=1100, commit_after=1e9, gpu=True)


class Slow:
    """Parts take until they are let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, write = Event(), PartWriter.write

        def slow(writer: PartWriter, *arguments: Any) -> Part:
            assert self.go_on.wait(60)
            return write(writer, *arguments)

        monkeypatch.setattr(PartWriter, "write", slow)


def test_a_gpu_goes_on_while_rows_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All documents go through the model before one part is written; what is set aside counts as memory."""
    slow, outputs = Slow(monkeypatch), replace(BESIDE, memory_limit=2800)
    shift = at_work(tmp_path, outputs)
    (member,) = shift.crew.members
    assert left(shift) == [700.0] and member.flushing and member.leaving > 0
    report = member.worker.report()
    assert (member.nbytes, member.leaving) == (report.nbytes, report.leaving)
    held = 4 * DIM * report.rows  # float32
    assert member.nbytes + member.leaving == held and member.worker.accumulator.nbytes < held
    assert not shift.store.manifest.pending
    slow.go_on.set()
    shift.finish()
    assert (member.held, member.rows, member.nbytes, member.leaving) == ([], 0, 0, 0)
    shift.store.complete(last=True)
    shift.store.close({"skipped_empty": 0}, {})
    manifest, problems = verify(tmp_path)
    assert problems == [] and manifest.counts["examples"] == 6 and not manifest.pending


@pytest.mark.parametrize("outputs", [BESIDE, Outputs(checkpoint_every=2, gpu=True)], ids=["spills", "checkpoints"])
def test_no_more_is_in_memory_than_may_be_and_parts_do_not_depend_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: Outputs
):
    """However slow it is: a run waits for its writers then, and the same rows lie in the same parts."""
    most, files = [0], []
    honest, largest = Numbers.run, max(sum(c.nbytes for c in captured.values()) for captured in every_batch())

    def watched(self: Numbers, *arguments: Any) -> Report:
        report = honest(self, *arguments)
        most[0] = max(most[0], report.nbytes + report.leaving)
        return report

    monkeypatch.setattr(Numbers, "run", watched)
    write = PartWriter.write
    for seconds in (0.0, 0.02):

        def late(writer: PartWriter, *arguments: Any, seconds: float = seconds) -> Part:
            time.sleep(seconds)
            return write(writer, *arguments)

        monkeypatch.setattr(PartWriter, "write", late)
        folder = tmp_path / str(seconds)
        folder.mkdir()
        run(folder, outputs)
        files.append({part.path: (part.rows, part.digest) for part in Manifest.load(folder).parts})
    assert files[0] == files[1] and len(files[0]) > 2 * len(SELECTION.heads)
    assert most[0] <= outputs.memory_limit + largest


def test_what_is_captured_while_a_writer_fails_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk refuses what was set aside; meanwhile more was captured. Both are written in the end."""
    slow, refused, honest = Slow(monkeypatch), [], PartWriter.write

    def refuse_once(writer: PartWriter, *arguments: Any) -> Part:
        part = honest(writer, *arguments)
        if not refused:
            refused.append(part)
            (tmp_path / part.path).unlink()
            raise CaptureError("no space")
        return part

    monkeypatch.setattr(PartWriter, "write", refuse_once)
    shift = at_work(tmp_path, replace(BESIDE, memory_limit=2800))
    slow.go_on.set()
    with pytest.raises(CaptureError, match="no space"):
        shift.finish()
    (member,) = shift.crew.members
    assert refused and member.held and member.worker.accumulator.nbytes
    shift.rescue()
    assert not member.worker.accumulator.nbytes and not member.held
    shift.store.complete(last=True)
    shift.store.close({"skipped_empty": 0}, {})
    manifest, problems = verify(tmp_path)
    assert problems == [] and manifest.counts["examples"] == 6


def test_a_second_interrupt_waits_for_no_part_that_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(part_writer, "WRITERS", 1)
    slow = Slow(monkeypatch)
    shift = at_work(tmp_path, replace(BESIDE, memory_limit=2800))
    (member,) = shift.crew.members
    writing = member.worker.leaving.writing
    assert len(writing) > 1
    Timer(0.05, slow.go_on.set).start()
    shift.crew.close()
    assert len(list(tmp_path.glob("captures/*/*/*.parquet"))) == 1 and writing.done


def every_batch() -> list[dict[tuple[int, str], torch.Tensor]]:
    """What the model shows of each document."""
    return [
        vectors(document, {pair: PICKER.pick(TokenBatch((document,), 0), *pair) for pair in SELECTION.draws})
        for document in DOCUMENTS
    ]
