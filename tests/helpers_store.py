"""Runs without a model: the real loop, shift, worker and store, over vectors made from where they are."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from sniffer import capture
from sniffer.dataset.tokenizing import ReadCounts
from sniffer.engine import shift
from sniffer.engine.base import Plan
from sniffer.engine.crew import Crew
from sniffer.engine.local import LocalPool
from sniffer.engine.worker import Report, Worker
from sniffer.errors import SnifferError
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.selection import Selection
from sniffer.process.clock import Clock
from sniffer.process.environment import versions
from sniffer.process.stop import Stop
from sniffer.runs.verify import verify
from sniffer.sampler import LogUniform, Picker
from sniffer.storage.examples import read_examples
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.on_disk import OnDisk, look
from sniffer.storage.part_writer import PartWriter
from sniffer.storage.schema import Example, Part
from sniffer.storage.store import Store
from sniffer.storage.tokens import read_tokens
from sniffer.types import KIND, Document, LengthClasses, TokenBatch, by_number
from tests.helpers_disk import Disk, failing
from tests.helpers_storage import make_manifest

SAMPLER = LogUniform(base_rate=2.0, min_bucket_size=8)
DIM = 4
HEADS = {"q": (0, 2), "k": (1,)}
SELECTION = Selection({(layer, kind): heads for layer in (0, 2) for kind, heads in HEADS.items()})
DOCUMENTS = tuple(
    Document(2**61 + number, f"text-{number}", np.arange(n, dtype=np.int32), number == 1)
    for number, n in enumerate((9, 40, 3, 25, 17, 30))
)
LENGTHS = {document.example_id: document.n_tokens for document in DOCUMENTS}
PICKER = Picker(SAMPLER, seed=7)
FIRST = replace(
    make_manifest(("q", "k"), (0, 2), dict.fromkeys(("q", "k", "v", "q_pre", "k_pre"), DIM), PICKER),
    selection={layer: dict(HEADS) for layer in (0, 2)},
)


@dataclass
class Outputs:
    """How a run writes; `commit_after` stands in for shift.COMMIT_AFTER. On a `gpu` it does so beside the model."""

    checkpoint_every: int | None = None
    memory_limit: float = float("inf")
    commit_after: float = 4
    gpu: bool = False


OUTPUTS = {
    "plain": Outputs(),
    "checkpoints": Outputs(checkpoint_every=2),
    "spills": Outputs(memory_limit=900, commit_after=4),
    "pending to the end": Outputs(memory_limit=1, commit_after=1e9),
    "checkpoints beside a GPU": Outputs(checkpoint_every=2, gpu=True),
    "spills beside a GPU": Outputs(memory_limit=900, commit_after=4, gpu=True),
}


@dataclass
class Engine:
    """What stands in for the model. After so many documents it is stopped, by an error or by a kill."""

    documents: Sequence[Document] = DOCUMENTS
    stop_after: int | None = None
    by: type[BaseException] = RuntimeError
    seen: list[int] = field(default_factory=list)
    device: str = "cpu"

    def batches(self, *_: Any) -> Iterator[TokenBatch]:
        for number, document in enumerate(self.documents):
            if number == self.stop_after:
                raise self.by("enough")
            yield TokenBatch((document,), pad_id=0)

    def crew(self, folder: Path) -> Crew:
        crew = Crew(LocalPool(lambda: Numbers(folder, self)), 1, math.inf)
        crew.open()
        return crew


class Numbers(Worker):
    """A worker without a model."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        super().__init__(SimpleNamespace(), folder)  # type: ignore[arg-type]
        self.engine = engine

    def open(self) -> Any:
        return SimpleNamespace(versions=versions(), device=torch.device(self.engine.device), process=os.getpid())

    def begin(self, plan: Plan) -> None:
        self.accumulator = Accumulator(plan.selection)
        self.writer = PartWriter(self.folder, plan.geometry, plan.picker, plan.dtype, plan.compression)

    def run(self, batch: TokenBatch, done: Any) -> Report:
        picks = {pair: PICKER.pick(batch, *pair) for pair in SELECTION.draws}
        (document,) = batch.documents
        self.engine.seen.append(document.example_id)
        self.accumulator.add(batch, picks, vectors(document, picks), done)
        self.examples.append(Example.of(document))
        return self.report()

    def _keep(self, leave: int = 0) -> None: ...


class Killed(BaseException):
    """As a kill, nothing is written after it."""


def vectors(document: Document, picks: Any) -> dict[tuple[int, str], torch.Tensor]:
    """Numbers that follow from example, layer, kind, position, head and coordinate."""
    found = {}
    for (layer, kind), heads in SELECTION.heads.items():
        positions = picks[layer, KIND[kind].draw].positions.astype(np.float32)
        columns = np.arange(len(heads) * DIM, dtype=np.float32) / 100
        start = document.n_tokens * 1000 + layer * 100 + "qk".index(kind) * 50
        found[layer, kind] = torch.from_numpy(start + positions[:, None] + columns)
    return found


def run(
    folder: Path, outputs: Outputs, engine: Engine | None = None, on_disk: OnDisk | None = None, **earlier: Any
) -> None:
    """A session: fresh, or with what an earlier one has `on_disk` and its manifest as keyword."""
    manifest = earlier.get("manifest", FIRST)
    engine = engine or Engine()
    engine.device = "cuda" if outputs.gpu else "cpu"
    begun = replace(manifest, status="running", reason=None)
    made = Store(folder, begun, PICKER, "float32", on_disk=on_disk or OnDisk(), tokens=True)
    with committing_after(outputs.commit_after):
        capture.capture_and_write(engine.crew(folder), plan(outputs), feed(engine), made, Clock(), Stop())


def plan(outputs: Outputs) -> Plan:
    geometry = by_number(FIRST.geometry)
    limits = outputs.checkpoint_every, outputs.memory_limit
    nothing: Any = None
    return Plan(geometry, SELECTION, PICKER, nothing, 1, "float32", "auto", LengthClasses(), *limits)


def feed(engine: Engine) -> Any:
    tokens = sum(document.n_tokens for document in engine.documents)
    return SimpleNamespace(
        batches=engine.batches,
        counts=ReadCounts(),
        expected_documents=len(engine.documents),
        expected_tokens=tokens,
        close=lambda: None,
    )


def resume(folder: Path, outputs: Outputs, engine: Engine | None = None) -> None:
    """As `runs resume` does; a folder without a manifest is begun."""
    if not {"manifest.json", ".manifest.json"} & set(os.listdir(folder)):
        run(folder, outputs, engine)
        return
    manifest, on_disk = look(folder, Manifest.recover(folder)[0])
    run(folder, outputs, engine, on_disk, manifest=manifest)


@contextmanager
def committing_after(times: float) -> Iterator[None]:
    with patch.object(shift, "COMMIT_AFTER", times):
        yield


Session = Callable[[Path], None]
"""A run in a folder, begun where there is nothing and resumed where there is something."""


def n_calls(folder: Path, session: Session, only: tuple[str, ...], begun: Path | None = None) -> int:
    """System calls of a session on a disk that does not fail."""
    disk = Disk(prepared(folder, begun), only=only)
    with failing(disk):
        session(folder)
    return len(disk.calls)


def must_survive(folder: Path, session: Session, disk: Disk, whole: str, begun: Path | None = None) -> None:
    """A session on a disk that fails, then one on a disk that does not: rows of `whole`, and what is told is so.

    Args:
        begun: the folder of an earlier session, to go on with; None for a fresh run.
    """
    prepared(folder, begun)
    known = [] if begun is None else verify(folder)[1]
    failure: Exception | None = None
    with failing(disk):
        try:
            session(folder)
        except (SnifferError, OSError) as error:
            # The command line tells either in one line, if it is of a file.
            assert isinstance(error, SnifferError) or error.filename
            failure = error
    happened = f"{disk.failed[:1]}, number {disk.at}: {failure}"
    assert failure is None or "\n" not in str(failure), happened
    if (folder / "manifest.json").exists():
        # What is on disk is right as it stands, before anything is mended.
        manifest, problems = verify(folder)
        assert set(problems) <= set(known), happened
        assert failure is not None or manifest.status == "complete", happened
        # A disk that fails once can take the last word of the session.
        assert manifest.status != "running" or disk.lasting or begun is not None, happened
    with failing(Disk(folder)):
        session(folder)
    manifest, problems = verify(folder)
    assert (problems, manifest.status, manifest.digest) == ([], "complete", whole), happened
    lengths = {one.example_id: one.n_tokens for one in read_examples(folder / RunFolder.EXAMPLES).values()}
    assert read_tokens(folder, manifest.tokens).lengths == lengths, happened


def prepared(folder: Path, begun: Path | None) -> Path:
    """An empty folder, or a copy."""
    shutil.rmtree(folder, ignore_errors=True)
    if begun is None:
        folder.mkdir()
    else:
        shutil.copytree(begun, folder)
    return folder


def killed(folder: Path, outputs: Outputs, after: int) -> Path:
    """A new folder, with a run that was killed before document number `after`."""
    folder.mkdir()
    with suppress(Killed):
        run(folder, outputs, Engine(stop_after=after, by=Killed))
    return folder


def repeat(folder: Path, number: int) -> Part:
    """Has a finished run hold the rows of one of its parts twice, as releases before did after a failed write."""
    manifest = Manifest.load(folder)
    part = manifest.parts[number]
    last = max(other.number for other in manifest.parts_of(part.layer, part.kind))
    again = replace(part, path=RunFolder.part(part.layer, part.kind, last + 1, len(manifest.geometry)))
    shutil.copy(folder / part.path, folder / again.path)
    replace(manifest, parts=(*manifest.parts, again)).save(folder)
    return again


def whole_digest(folder: Path) -> str:
    """Of the run that nothing happened to."""
    run(folder, Outputs())
    manifest, problems = verify(folder)
    assert problems == [] and manifest.status == "complete" and manifest.rows > 100
    return manifest.digest
