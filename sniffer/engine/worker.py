"""A worker: one process with a model of its own, which captures the batches it is given and writes parts.

It knows nothing of other workers, nor of what runs it; a shift (shift.py) hands out the batches, and has the store name
in the manifest what a worker has written. Everything that goes in and out is plain data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from sniffer.engine.base import Plan, describe_device, dtype_name
from sniffer.engine.facts import Facts
from sniffer.engine.generating import generation_of, language_model_of
from sniffer.engine.model_cache import Load, load_anew
from sniffer.engine.reports import Flushed, Leaving, Report
from sniffer.errors import CaptureError
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.attention.attending import AttentionPlan
from sniffer.forward.attention.facts import score_facts
from sniffer.forward.attention.prove import prove
from sniffer.forward.generation.session import Generation
from sniffer.forward.moments.counting import MomentsPlan, Totals
from sniffer.forward.observer import draw
from sniffer.forward.passes import Passes
from sniffer.process.clock import Clock
from sniffer.process.environment import versions
from sniffer.process.memory import available_memory, free_memory, keep_freed_memory
from sniffer.storage.layout import RunFolder
from sniffer.storage.moments import Moved, write_moments
from sniffer.storage.part_writer import PartWriter, Writing
from sniffer.storage.schema import Example
from sniffer.types import Checkpoint, TokenBatch

Progress = Callable[[int], AbstractContextManager[Callable[[], object]]]
"""Given how many parts there are to write: a context, which yields what is called after each."""


def unseen(_: int) -> AbstractContextManager[Callable[[], object]]:
    return nullcontext(lambda: None)


class Worker:
    """One process's share of a run.

    Args:
        folder: of the run, on a file system that the driver shares.
        threads: of a forward pass on a CPU; None leaves them as they are.
        load: how to come by the model.
        progress: is shown the parts as they are written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        threads: int | None = None,
        load: Load = load_anew,
        progress: Progress = unseen,
    ) -> None:
        self.checkpoint = checkpoint
        self.folder = folder
        self.threads = threads
        self.load = load
        self.progress = progress
        self.clock = Clock()
        self.examples: list[Example] = []
        self.leaving: Leaving | None = None
        self.totals: Totals | None = None
        self.generation: Generation | None = None
        self.moments: str | None = None
        """Where those of all documents that left whole lie."""

    def open(self) -> Facts:
        """Loads the model.

        Raises:
            CaptureError: the run folder is not to be seen from here.
            SnifferError: as `Checkpoint.load`.
        """
        if not (self.folder / RunFolder.CONFIG).is_file():
            raise CaptureError(
                f"a worker does not see {self.folder}: choose hydra.run.dir on a file system that all nodes share"
            )
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        self.checkpoint.check()
        self.backbone = self.load(self.checkpoint)
        keep_freed_memory(self.backbone.device)
        scores, head = score_facts(self.backbone), language_model_of(self.backbone)
        return Facts(
            geometry=tuple(replace(layer, scaling=scores[layer.layer][0]) for layer in self.backbone.geometry),
            scores={layer: facts for layer, (_, facts) in scores.items()},
            rope=self.backbone.rope,
            model_config=self.backbone.model_config(),
            dtype=self.backbone.dtype,
            device=self.backbone.device,
            pre_missing=self.backbone.pre_missing,
            vocabulary=self.backbone.vocabulary,
            lengths=self.backbone.lengths,
            backbone=self.backbone.describe(),
            described=describe_device(self.backbone),
            model=self.checkpoint.describe(),
            threads=torch.get_num_threads(),
            versions=versions(),
            process=os.getpid(),
            available=available_memory(),
            resident=psutil.Process().memory_info().rss,
            device_free=free_memory(self.backbone.device),
            eos=() if head is None else head.eos,
            pads=head is None or head.pads,
        )

    def begin(self, plan: Plan) -> None:
        """Takes the plan that all batches to come follow."""
        self.plan = plan
        self.accumulator = Accumulator(plan.selection)
        layout, dtype = plan.attention, dtype_name(self.backbone.dtype)
        attention = None
        if layout is not None:
            ways = prove(self.backbone, plan.selection.layers)
            attention = AttentionPlan(layout, ways, plan.picker.side("k").buckets_until(plan.longest))
        moments = None
        if plan.moments is not None:
            moments = MomentsPlan(plan.moments, plan.selection.moments, plan.picker, self.backbone.rope)
        self.passes = Passes(self.backbone, plan.selection, self.accumulator, self.clock, attention, moments)
        self.totals = self.passes.totals
        self.generation = generation_of(plan, self.backbone, self.passes, self.checkpoint)
        how = plan.compression, layout, plan.sections
        self.writer = PartWriter(self.folder, plan.geometry, plan.picker, dtype, *how)

    def run(self, batch: TokenBatch, done: Mapping[tuple[int, str], Collection[int]]) -> Report:
        """Captures one batch, but rows that are `done` already (see `Accumulator.add`)."""
        if self.generation is not None:
            self.generation.run(batch, done)
        else:
            with self.clock.stage("sample"):
                picks = draw(self.plan.picker, self.plan.selection, batch)
            self.passes.run(batch, picks, done)
        self._keep(leave=1)
        return self.report()

    def report(self) -> Report:
        leaving = 0 if self.leaving is None else self.leaving.writing.rows.nbytes
        found = {} if self.generation is None else self.generation.take_differences()
        return Report(self.rows, self.accumulator.nbytes, self._seconds(), leaving, found)

    def flush(self, number: int, leave: float = 0.0) -> Flushed:
        """Writes rows that are held, as parts of this number, and lets go of them: the largest (layer, kind) pairs.

        May be called again where it has failed, and goes on with what could not be written.

        Args:
            leave: bytes that may stay in memory; with 0 all is written.
        """
        writing = self.begin_flush(number, leave)
        with self.progress(len(writing)) as done:
            return self.end_flush(done)

    def begin_flush(self, number: int, leave: float = 0.0) -> Writing:
        """Begins what `flush` does, and returns while threads are at it; batches may be run until it is ended."""
        assert self.leaving is None, "one after the other"
        failure: Exception | None = None
        try:
            self._keep()
        except Exception as error:  # what is in memory already is worth keeping all the same
            failure = error
        aside = self.accumulator.set_aside(largest(self.accumulator, leave))
        examples, rows, whole = tuple(self.examples), dict(self.accumulator.rows), not self.accumulator.nbytes
        moments: Moved | None = None
        if whole:
            try:
                moments = self._write_moments(number)
            except CaptureError as error:
                whole, failure = False, failure or error
        if whole:
            self.examples = []
            self.accumulator.rows = dict.fromkeys(rows, 0)
        self.leaving = Leaving(self.writer.begin(aside, number), examples, rows, whole, failure, moments)
        return self.leaving.writing

    def _write_moments(self, number: int) -> Moved | None:
        """All of them, for batches go on to be added to what there is."""
        if self.totals is None or not self.examples:
            return None
        path, totals = RunFolder.moments(number), self.totals
        record = write_moments(self.folder, path, totals.rows(), totals.documents)
        return Moved(record, self.moments)

    def end_flush(self, done: Callable[[], object] = lambda: None) -> Flushed:
        """Waits for what `begin_flush` has begun, and takes back what could not be written.

        Args:
            done: called after each part.
        """
        leaving = self.leaving
        assert leaving is not None
        parts, failure = leaving.writing.end(done)
        self.leaving, whole = None, leaving.whole and failure is None
        if failure is not None:
            self.accumulator.take_back(leaving.writing.rows)
        if leaving.whole and not whole:
            self.examples[:0] = leaving.examples
            for kind, rows in leaving.rows.items():
                self.accumulator.rows[kind] += rows
        moments = leaving.moments if whole else None
        if moments is not None:
            self.moments = moments.record.path
        captured, failure = sum(leaving.rows.values()), leaving.failure or failure
        held, seconds = self.accumulator.nbytes, self._seconds()
        return Flushed(tuple(parts), leaving.examples, captured, held, seconds, whole, failure, moments)

    @property
    def rows(self) -> int:
        """Captured since the last flush that was whole and has ended."""
        leaving = self.leaving.rows if self.leaving is not None and self.leaving.whole else {}
        return sum(self.accumulator.rows.values()) + sum(leaving.values())

    def _keep(self, leave: int = 0) -> None:
        for batch in self.passes.settle(leave):
            self.examples += [Example.of(document) for document in batch.documents]

    def _seconds(self) -> Mapping[str, float]:
        seconds, self.clock.seconds = self.clock.seconds, {}
        return seconds


def largest(accumulator: Accumulator, leave: float) -> list[tuple[int, str]]:
    """The largest (layer, kind) pairs, so many that at most `leave` bytes are left without them."""
    left, chosen = accumulator.nbytes, []
    for pair in accumulator.by_size():
        if left <= leave:
            break
        chosen.append(pair)
        left -= accumulator.held(*pair)
    return chosen
