"""The run folder while it is being written: rows become parts, and the manifest names those that count."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from sniffer.accumulator import Accumulator
from sniffer.environment import now
from sniffer.manifest import Manifest
from sniffer.sampler import Picker, describe
from sniffer.schema import Example, Footer, Part, part_path
from sniffer.terminal import write_progress
from sniffer.types import Document
from sniffer.writer import write_examples, write_part

WRITERS = min(4, os.cpu_count() or 1)
"""Parts written at a time; each holds one span of one head beside the captured rows."""


class Store:
    """Writes a run's parts and keeps its manifest.

    Opening it saves a manifest with status `running`, so that from then on the folder is a run's.
    """

    def __init__(self, folder: Path, manifest: Manifest, picker: Picker, source_dtype: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.picker = picker
        self.source_dtype = source_dtype
        self.examples: list[Example] = []
        self.manifest.save(folder)

    def add_examples(self, documents: Iterable[Document]) -> None:
        """Remembers which texts the captured rows are from."""
        self.examples += map(Example.of, documents)

    def write(self, accumulator: Accumulator) -> None:
        """Writes what was accumulated, one part per (layer, kind), and commits it.

        Raises:
            CaptureError: the disk is full or cannot be written to.
        """
        pairs = [(layer, kind) for layer, kinds in self.manifest.selection.items() for kind in kinds]
        with ThreadPoolExecutor(WRITERS, "writer") as pool, write_progress(len(pairs)) as done:
            parts = []
            for part in pool.map(lambda pair: self._write_part(accumulator, *pair), pairs):
                parts.append(part)
                done()
        examples = write_examples(self.folder, self.examples)
        self._commit(parts=(*self.manifest.parts, *parts), examples=examples)

    def close(
        self, counts: dict[str, int], timings: dict[str, float], interrupted_by: BaseException | None = None
    ) -> None:
        """Commits the run's end: complete, or interrupted and by what."""
        reason = None if interrupted_by is None else describe_interruption(interrupted_by)
        self._commit(
            status="complete" if reason is None else "interrupted",
            reason=reason,
            finished=now(),
            counts=counts,
            timings={stage: round(seconds, 3) for stage, seconds in timings.items()},
        )

    def _write_part(self, accumulator: Accumulator, layer: int, kind: str) -> Part:
        geometry = self.manifest.layer(layer)
        columns = accumulator.take(layer, kind, geometry.dims[kind])
        footer = Footer(
            layer=layer,
            kind=kind,
            dim=geometry.dims[kind],
            source_dtype=self.source_dtype,
            sliding_window=geometry.sliding_window,
            scaling=geometry.scaling,
            sampler=describe(self.picker.sampler),
            seed=self.picker.seed,
            seed_by=tuple(self.picker.sampler.seed_by),
        )
        number = len(self.manifest.parts_of(layer, kind))
        n_layers = 1 + max(other.layer for other in self.manifest.geometry)
        return write_part(self.folder, part_path(layer, kind, number, n_layers), columns, footer)

    def _commit(self, **changes: object) -> None:
        longest = max((example.n_tokens for example in self.examples), default=0)
        law = {
            **describe(self.picker.sampler),
            "probability_by_bucket": self.picker.probability_by_bucket(longest),
        }
        self.manifest = replace(self.manifest, sampler=law, **changes)  # type: ignore[arg-type]
        self.manifest.save(self.folder)


def describe_interruption(error: BaseException) -> str:
    """One line for the manifest."""
    name = type(error).__name__
    return f"{name}: {' '.join(str(error).split())}" if str(error).strip() else name
