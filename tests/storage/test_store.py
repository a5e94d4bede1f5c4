"""Every row is on disk once, whatever system call fails: the real store and loop, without a model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sniffer.errors import CaptureError
from sniffer.runs.verify import verify
from sniffer.storage.manifest import Manifest
from sniffer.storage.store import Store
from tests.helpers_disk import Disk, failing
from tests.helpers_store import (
    DOCUMENTS,
    FIRST,
    OUTPUTS,
    PICKER,
    SELECTION,
    Engine,
    Numbers,
    killed,
    must_survive,
    n_calls,
    plan,
    resume,
    run,
    whole_digest,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return whole_digest(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path, FIRST, PICKER, "float32")
    made.begin()
    return made


@pytest.fixture
def worker(store: Store) -> Numbers:
    """With the rows of the first documents."""
    engine = Engine(DOCUMENTS[:3])
    filled = Numbers(store.folder, engine)
    filled.begin(plan(OUTPUTS["plain"]))
    for batch in engine.batches():
        filled.run(batch, {})
    return filled


def flush(worker: Numbers, store: Store, leave: float = 0.0) -> None:
    """As a shift does."""
    flushed = worker.flush(store.next_number(), leave)
    store.adopt(flushed.parts, flushed.examples, whole=flushed.whole)
    if flushed.failure is not None:
        raise flushed.failure


def without_largest(worker: Numbers, n: int) -> float:
    """Bytes that are left without the n largest (layer, kind) pairs."""
    held = worker.accumulator
    return held.nbytes - sum(held.held(*pair) for pair in held.by_size()[:n])


@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS)
def test_parts_and_commits_change_no_row(tmp_path: Path, whole: str, outputs):
    run(tmp_path, outputs)
    manifest, problems = verify(tmp_path)
    assert (problems, manifest.digest) == ([], whole)


# All calls of all kinds of runs take minutes: tests/faults has them.
@pytest.mark.parametrize("name", ["checkpoints", "spills", "spills beside a GPU"])
def test_a_call_that_fails_once_costs_no_row_and_gives_none_twice(tmp_path: Path, whole: str, name: str):
    folder, only, session = tmp_path / "run", ("replace",), partial(resume, outputs=OUTPUTS[name])
    for at in range(1, 1 + n_calls(folder, session, only), 4):
        must_survive(folder, session, Disk(folder, at, only=only), whole)


def test_nor_does_one_in_a_resumed_run(tmp_path: Path, whole: str):
    begun, folder, only = killed(tmp_path / "begun", OUTPUTS["spills"], 4), tmp_path / "run", ("fsync",)
    session = partial(resume, outputs=OUTPUTS["spills"])
    for at in range(1, 1 + n_calls(folder, session, only, begun), 8):
        must_survive(folder, session, Disk(folder, at, only=only), whole, begun)


@pytest.mark.parametrize("at", range(1, 5))
def test_a_failed_save_leaves_each_row_in_one_place(store: Store, worker: Numbers, at: int):
    """Renamed are two parts, the manifest and its twin: either a row left memory and is named, or neither."""
    held = {pair: len(worker.accumulator.columns(*pair, 4)) for pair in SELECTION.heads}
    with failing(Disk(store.folder, at, only=("replace",))), pytest.raises(CaptureError):
        flush(worker, store, without_largest(worker, 2))
    named = {
        (part.layer, part.kind): part.rows // len(SELECTION.heads[part.layer, part.kind])
        for part in store.manifest.pending
    }
    assert len(named) == (1 if at < 3 else 2)
    for pair, rows in held.items():
        assert len(worker.accumulator.columns(*pair, 4)) + named.get(pair, 0) == rows


def test_the_next_save_makes_up_for_one_that_failed(store: Store, worker: Numbers):
    with failing(Disk(store.folder, 3, only=("replace",))), pytest.raises(CaptureError):
        flush(worker, store, without_largest(worker, 2))
    assert not Manifest.load(store.folder).pending
    flush(worker, store)
    manifest, problems = verify(store.folder)
    assert problems == [] and len(manifest.parts) == len(SELECTION.heads)
    assert manifest.counts["examples"] == 3


@pytest.mark.parametrize("at", range(1, 5))
def test_what_could_not_be_written_is_written_by_the_next_flush(store: Store, worker: Numbers, whole: str, at: int):
    """A part of four fails: its rows stay, and its documents come again with them."""
    with failing(Disk(store.folder, at, only=("replace",))), pytest.raises(CaptureError):
        flush(worker, store)
    assert len(Manifest.load(store.folder).pending) == 3 and not store.examples
    flush(worker, store)
    manifest, problems = verify(store.folder)
    assert problems == [] and {part.number for part in manifest.parts} == {0, 1}
    assert manifest.counts["examples"] == 3 and not worker.accumulator.nbytes
    resume(store.folder, OUTPUTS["plain"])
    assert Manifest.load(store.folder).digest == whole


def test_documents_of_a_worker_are_named_with_its_parts_or_not_at_all(store: Store, worker: Numbers):
    """A worker has let go of the rows: what is told next must have both, even if the first save fails."""
    flushed = worker.flush(store.next_number())
    assert flushed.whole and len(flushed.parts) == len(SELECTION.heads)
    with failing(Disk(store.folder, 2, only=("replace",))), pytest.raises(CaptureError):
        store.adopt(flushed.parts, flushed.examples, whole=True)
    store.adopt([], [], whole=True)
    manifest, problems = verify(store.folder)
    assert problems == [] and manifest.counts["examples"] == 3 and manifest.parts


def test_the_number_of_a_part_that_may_be_on_disk_is_not_used_again(store: Store, worker: Numbers):
    """Renamed, but the rename not flushed: nobody knows what the disk will have in the end."""
    with (
        failing(Disk(store.folder / "captures/layer=00/kind=q", 2, only=("fsync",))) as disk,
        pytest.raises(CaptureError),
    ):
        flush(worker, store, without_largest(worker, 1))
    assert disk.failed == ["fsync ."] and not store.manifest.pending
    flush(worker, store, without_largest(worker, 1))
    assert [part.number for part in store.manifest.pending] == [1]


def test_numbers_for_workers_are_nobodys_else(store: Store, worker: Numbers):
    flush(worker, store)
    first = store.next_number()
    assert (first, store.next_number()) == (1, 2)
    again = Store(store.folder, Manifest.load(store.folder), PICKER, "float32")
    assert again.next_number() == 1


def test_a_leftover_that_cannot_be_removed_is_one_line(store: Store, tmp_path: Path):
    leftover = tmp_path / "captures/layer=00/kind=q/part-00009.parquet"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    with (
        failing(Disk(tmp_path, 1, only=("unlink",))),
        pytest.raises(CaptureError, match="could not remove.*part-00009"),
    ):
        store.tidy()
    store.tidy()
    assert not leftover.exists()


def test_what_stopped_the_run_is_told_even_if_nothing_can_be_written_then(tmp_path: Path):
    after_begin = Disk(tmp_path, 3, lasting=True, only=("write",))
    with failing(after_begin), pytest.raises(RuntimeError, match="enough"):
        run(tmp_path, OUTPUTS["plain"], Engine(stop_after=3))
    assert after_begin.failed and Manifest.load(tmp_path).status == "running"
    resume(tmp_path, OUTPUTS["plain"])
    assert verify(tmp_path)[1] == []


def test_seconds_are_not_counted_twice_by_a_second_save(store: Store):
    store.manifest = replace(store.manifest, timings={"load": 1.0})
    again = Store(store.folder, store.manifest, PICKER, "float32")
    for _ in range(2):
        again.close({"skipped_empty": 0}, {"load": 2.0}, RuntimeError("enough"))
    assert again.manifest.timings == {"load": 3.0}
