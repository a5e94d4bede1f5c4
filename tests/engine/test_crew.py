"""A crew of workers, all of them in this process: whatever becomes of them, the rows are those of one process."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from sniffer import capture
from sniffer.engine.engine import Engine
from sniffer.engine.model_cache import LastModel
from sniffer.engine.pool import WorkerLost
from sniffer.engine.worker import Worker
from sniffer.errors import CaptureError
from sniffer.runs.verify import verify
from sniffer.storage import part_writer
from sniffer.storage.manifest import Manifest
from tests.helpers_runs import TEXTS, Runs, must_be_whole, take_up
from tests.helpers_storage import codecs
from tests.tiny_run import save_texts

MODEL = LastModel()

Fate = Callable[["OnePool", str], str]
"""What becomes of a call: `well`, `before` (the worker is gone before it), `after` (its answer is lost)."""


class Quick(Worker):
    """A worker that does not load the model anew, nor change this process's threads."""

    def open(self):
        load, self.checkpoint = self.checkpoint, _Loaded(self.checkpoint)
        facts = super().open()
        self.checkpoint = load
        return facts


class _Loaded:
    def __init__(self, checkpoint) -> None:
        self.checkpoint = checkpoint

    def check(self) -> None: ...

    def load(self):
        return MODEL.load(self.checkpoint)

    def describe(self):
        return self.checkpoint.describe()


@dataclass
class OnePool:
    """Workers in this process; each `wait` has one of the calls done, in an order drawn by `chance`."""

    make: Callable[[], Worker]
    fate: Fate
    chance: random.Random
    queues: dict[int, list[tuple[int, str, tuple]]] = field(default_factory=dict)
    workers: dict[int, Worker] = field(default_factory=dict)
    answers: dict[int, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    numbers: int = 0
    dismissed: int = 0
    may_lose: bool = True

    def hire(self) -> int:
        self.numbers += 1
        self.workers[self.numbers], self.queues[self.numbers] = self.make(), []
        return self.numbers

    def call(self, worker: int, method: str, *arguments: Any) -> int:
        self.numbers += 1
        if worker in self.workers:
            self.queues[worker].append((self.numbers, method, arguments))
        else:
            self.answers[self.numbers] = WorkerLost("gone")
        return self.numbers

    def wait(self, tickets: Sequence[int], seconds: float) -> list[int]:
        busy = [worker for worker in self.workers if self.queues[worker]]
        if busy:
            self.work(self.chance.choice(busy))
        return [ticket for ticket in tickets if ticket in self.answers]

    def work(self, worker: int) -> None:
        ticket, method, arguments = self.queues[worker].pop(0)
        self.calls.append(method)
        becomes = self.fate(self, method)
        if becomes != "before":
            try:
                self.answers[ticket] = getattr(self.workers[worker], method)(*arguments)
            except Exception as error:
                self.answers[ticket] = error
        if becomes != "well":
            del self.workers[worker]
            for other, *_ in [(ticket,), *self.queues[worker]]:
                self.answers[other] = WorkerLost("killed")

    def result(self, ticket: int) -> Any:
        answer = self.answers.pop(ticket)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def dismiss(self, worker: int) -> None:
        self.dismissed += self.workers.pop(worker, None) is not None


class OneEngine(Engine):
    def __init__(self, fate: Fate, size: int = 3, seed: int = 0) -> None:
        super().__init__(size, per_node=size, start_timeout=60.0)
        self.fate, self.chance = fate, random.Random(seed)

    def pool(self, config, folder):
        self.made = OnePool(lambda: Quick(config.model, folder, threads=1), self.fate, self.chance)
        return self.made


def well(pool: OnePool, method: str) -> str:
    return "well"


@pytest.fixture(scope="module")
def runs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("crew")
    return Runs(checkpoint, save_texts(place / "texts.jsonl", TEXTS), place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """What one process captures."""
    return runs.start("whole")


@pytest.fixture
def by_crew(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Captures with an engine that is given, into a folder of the test's own."""

    def start(engine: OneEngine, *more: str, name: str = "run") -> Path:
        monkeypatch.setattr(capture, "engine_for", lambda *_: engine)
        return replace_place(runs, tmp_path).start(name, *more)

    return start


def replace_place(runs: Runs, place: Path) -> Runs:
    return Runs(runs.checkpoint, runs.texts, place)


@pytest.mark.parametrize("more", [(), ("output.checkpoint_every=3",), ("output.memory_limit=2kB",)])
def test_a_crew_captures_what_one_process_does(by_crew, whole: Path, more: tuple[str, ...]):
    must_be_whole(by_crew(OneEngine(well), *more), whole)


def test_a_crew_keeps_lengths_apart_as_one_process_does(by_crew, runs: Runs):
    """Documents of 66 and 68 tokens would share a batch; this model turns positions otherwise from 67 on."""
    rope = "{rope_type: longrope, factor: 4.0, original_max_position_embeddings: 66"
    rope += f", short_factor: {[1.0] * 4}, long_factor: {[4.0] * 4}}}"
    model = f"model.config_overrides={{rope_parameters: {rope}}}"
    whole = runs.start("longrope", model)
    assert Manifest.load(whole).backbone["lengths"] == {"breaks": [67]}
    must_be_whole(by_crew(OneEngine(well), model), whole)


def test_workers_compress_as_asked(by_crew, whole: Path):
    folder = by_crew(OneEngine(well), "output.compression=zstd")
    assert codecs(folder) == {"ZSTD"}
    assert Manifest.load(folder).digest == Manifest.load(whole).digest


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("more", [(), ("output.checkpoint_every=2",)])
def test_lost_workers_cost_no_row(by_crew, whole: Path, seed: int, more: tuple[str, ...]):
    """Killed at random: while loading, in a batch, before and after parts are written."""
    chance = random.Random(100 + seed)
    left = [4]

    def fate(pool: OnePool, method: str) -> str:
        if not left[0] or chance.random() > 0.3:
            return "well"
        left[0] -= 1
        return chance.choice(["before", "after"])

    engine = OneEngine(fate, seed=seed)
    folder = by_crew(engine, *more)
    must_be_whole(folder, whole)
    assert left[0] < 4


def test_parts_of_a_lost_answer_are_not_left_behind(by_crew, whole: Path):
    lost = []

    def fate(pool: OnePool, method: str) -> str:
        if method == "flush" and not lost:
            lost.append(method)
            return "after"
        return "well"

    folder = by_crew(OneEngine(fate))
    must_be_whole(folder, whole)
    manifest = Manifest.load(folder)
    named = {record.path for record in (*manifest.parts, *manifest.tokens)}
    assert lost and {file.relative_to(folder).as_posix() for file in folder.rglob("part-*")} == named


def test_a_batch_that_kills_every_worker_is_named(by_crew):
    def fate(pool: OnePool, method: str) -> str:
        return "before" if method == "run" else "well"

    with pytest.raises(CaptureError, match=r"3 workers were lost over document 'doc-\d+'.*lower batch.max_tokens"):
        by_crew(OneEngine(fate, size=1))


def test_workers_that_never_have_their_model_end_the_run(by_crew):
    engine = OneEngine(lambda pool, method: "before", size=2)
    with pytest.raises(CaptureError, match="6 workers were lost while they loaded the model"):
        by_crew(engine)


def test_what_a_worker_raises_ends_the_run_and_keeps_the_rest(
    by_crew, runs: Runs, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest, batches = Worker.run, []

    def run(self, batch, done):
        batches.append(batch)
        if len(batches) == 4:
            raise ZeroDivisionError("of all things")
        return honest(self, batch, done)

    monkeypatch.setattr(Worker, "run", run)
    engine = OneEngine(well, size=2)
    with pytest.raises(ZeroDivisionError, match="of all things"):
        by_crew(engine)
    folder = tmp_path / "run"
    manifest, problems = verify(folder)
    assert problems == [] and (manifest.status, manifest.reason) == ("interrupted", "ZeroDivisionError: of all things")
    assert manifest.counts["examples"] >= 3 and not engine.made.workers
    monkeypatch.undo()
    take_up(folder)
    must_be_whole(folder, whole)


def test_a_crew_takes_up_what_one_process_left(by_crew, runs: Runs, whole: Path, monkeypatch: pytest.MonkeyPatch):
    folder = runs.start("stopped", "output.checkpoint_every=2", stop_after=3)
    before = Manifest.load(folder).counts["examples"]
    engine = OneEngine(well)
    monkeypatch.setattr(capture, "engine_for", lambda *_: engine)
    take_up(folder)
    must_be_whole(folder, whole)
    assert before and engine.made.calls.count("run") < len(TEXTS)


def test_rows_that_could_not_be_written_are_captured_again(
    by_crew, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The disk has no room for parts after the first: that one is kept, and the run can go on."""
    with monkeypatch.context() as full:
        full.setattr(part_writer, "write_part", refusing(lambda at: at >= 2, part_writer.write_part))
        with pytest.raises(CaptureError, match="No space left"):
            by_crew(OneEngine(well, size=2), "output.checkpoint_every=3")
    folder = tmp_path / "run"
    manifest, problems = verify(folder)
    assert problems == [] and manifest.status == "interrupted" and manifest.pending
    take_up(folder)
    must_be_whole(folder, whole)


@pytest.mark.parametrize("size", [1, 2])
def test_rows_that_can_be_written_at_a_second_try_are_not_lost(
    by_crew, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
):
    """What could not be written stays with the worker, and is written when the run ends."""
    with monkeypatch.context() as full:
        full.setattr(part_writer, "write_part", refusing(lambda at: at == 2, part_writer.write_part))
        with pytest.raises(CaptureError, match="No space left"):
            by_crew(OneEngine(well, size=size), "output.checkpoint_every=3")
    folder = tmp_path / "run"
    manifest, problems = verify(folder)
    assert problems == [] and manifest.status == "interrupted"
    assert not manifest.pending and manifest.counts["examples"] >= 3
    take_up(folder)
    must_be_whole(folder, whole)


def refusing(when: Callable[[int], bool], honest: Callable) -> Callable:
    """Writes parts, but for some in the order in which they come, as on a disk that is full."""
    calls = []

    def write(*arguments):
        calls.append(arguments)
        if when(len(calls)):
            raise CaptureError("could not write: No space left on device")
        return honest(*arguments)

    return write


@pytest.mark.parametrize("what", ["manifest.json", ".manifest.json", "examples.parquet"])
def test_what_cannot_be_named_at_once_is_named_later(by_crew, whole: Path, tmp_path: Path, what: str):
    """A worker has let go of its rows, and the save that names them fails: no row is lost, and none comes twice."""
    folder, honest, seen = tmp_path / "run", os.replace, []

    def fail_once(source, target):
        seen.extend([target] if Path(target).name == what else [])
        if Path(target).name == what and len(seen) == (2 if what == "examples.parquet" else 4):
            raise OSError(errno.EIO, "Input/output error", str(target))
        honest(source, target)

    with patch.object(os, "replace", fail_once), pytest.raises(CaptureError, match="Input/output error"):
        by_crew(OneEngine(well, size=2), "output.checkpoint_every=3")
    manifest, problems = verify(folder)
    assert problems == [] and manifest.status == "interrupted"
    take_up(folder)
    must_be_whole(folder, whole)


def test_a_copy_that_fails_ends_the_run_and_keeps_the_rest(
    by_crew, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a batch that went through the model, the rows are lost on their way to the host."""
    from sniffer.forward.transfer import HostTransfer

    honest, calls = HostTransfer.settle, []

    def settle(self, vectors):
        calls.append(vectors)
        if len(calls) == 5:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return honest(self, vectors)

    monkeypatch.setattr(HostTransfer, "settle", settle)
    with pytest.raises(CaptureError, match="the device failed .*launch failure"):
        by_crew(OneEngine(well, size=2))
    folder = tmp_path / "run"
    manifest, problems = verify(folder)
    assert problems == [] and manifest.status == "interrupted" and manifest.counts["examples"] >= 3
    monkeypatch.undo()
    take_up(folder)
    must_be_whole(folder, whole)


def test_a_worker_with_other_versions_is_refused(by_crew, monkeypatch: pytest.MonkeyPatch):
    honest = Quick.open

    def older(self):
        facts = honest(self)
        return replace(facts, versions={**facts.versions, "transformers": "4.0"})

    monkeypatch.setattr(Quick, "open", older)
    with pytest.raises(CaptureError, match="a worker has transformers 4.0, this process"):
        by_crew(OneEngine(well))


def test_documents_go_to_whoever_is_free(by_crew, runs: Runs, whole: Path):
    engine = OneEngine(well, size=3)
    must_be_whole(by_crew(engine), whole)
    assert engine.made.calls.count("flush") == 3  # all three had something to write


@pytest.mark.parametrize(
    ("number", "place", "change", "named"),
    [
        (1, "model", {"files": {"model.safetensors": "sha256:0"}}, "model.files.model.safetensors"),
        (2, "model", {"files": {"model.safetensors": "sha256:0"}}, "model.files.model.safetensors"),
        (2, "backbone", {"code": {"modeling_llama": "local copy, sha256:0"}}, "backbone.code.modeling_llama"),
        (2, "backbone", {"packages": {"flash-attn": "2.8"}}, "backbone.packages.flash-attn"),
    ],
)
def test_a_worker_with_another_model_at_the_same_place_is_refused(
    by_crew, monkeypatch: pytest.MonkeyPatch, number: int, place: str, change: dict, named: str
):
    """The first one is compared with this process, the others with the first."""
    honest, opened = Quick.open, []

    def open_another(self):
        facts = honest(self)
        opened.append(facts)
        return replace(facts, **{place: {**getattr(facts, place), **change}}) if len(opened) == number else facts

    monkeypatch.setattr(Quick, "open", open_another)
    with pytest.raises(CaptureError, match="another checkpoint" if number == 1 else "different models") as caught:
        by_crew(OneEngine(well, size=2))
    assert named in str(caught.value)


def test_a_worker_on_another_gpu_is_told_of(by_crew, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    honest, opened = Quick.open, []

    def open_elsewhere(self):
        opened.append(self)
        return replace(honest(self), described={"type": "cuda", "name": ("H100", "A100")[len(opened) > 1]})

    monkeypatch.setattr(Quick, "open", open_elsewhere)
    by_crew(OneEngine(well, size=2))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["workers compute on different devices, and so round differently: device.name: H100 then, A100 now"]
