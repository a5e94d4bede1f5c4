"""From accumulated rows to parts: what a part's name and footer say follows from the run.

Parts share nothing, so each is sorted and written by a thread of its own, as many at a time as there are cores. NumPy,
pyarrow, hashing and the system let go of the interpreter meanwhile: it is free to launch the next forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path

from sniffer.forward.accumulator import Accumulator
from sniffer.process.threads import usable_cores
from sniffer.sampler import Picker, describe
from sniffer.storage.layout import RunFolder
from sniffer.storage.schema import Footer, Part
from sniffer.storage.writer import write_part
from sniffer.types import KIND, AttentionLayout, LayerGeometry, columns_of

WRITERS = min(16, usable_cores())
"""Parts written at a time; each holds one span of one head beside the captured rows."""


@dataclass(frozen=True)
class PartWriter:
    """Writes the parts of one run.

    `source_dtype` is the model's dtype before widening to float32; `compression` one of sniffer.types.COMPRESSIONS;
    `layout` says which columns statistics of attention have, `sections` whether documents have any.
    """

    folder: Path
    geometry: Mapping[int, LayerGeometry]
    picker: Picker
    source_dtype: str
    compression: str = "auto"
    layout: AttentionLayout | None = None
    sections: bool = False

    def write(self, accumulator: Accumulator, pair: tuple[int, str], number: int) -> Part:
        """One part with the rows of one (layer, kind), which stay in the accumulator.

        Raises:
            CaptureError: the disk is full or cannot be written to.
        """
        layer, kind = pair
        geometry = self.geometry[layer]
        columns = accumulator.columns(layer, kind, geometry.dims[kind])
        footer = Footer(
            layer=layer,
            kind=kind,
            dim=geometry.dims[kind],
            source_dtype="float32" if KIND[kind].statistics else self.source_dtype,
            sliding_window=geometry.sliding_window,
            scaling=geometry.scaling,
            sampler=describe(self.picker.sampler),
            seed=self.picker.seed,
            seed_by=tuple(self.picker.sampler.side(KIND[kind].draw).seed_by),
        )
        path = RunFolder.part(layer, kind, number, 1 + max(self.geometry))
        values = columns_of(geometry, kind, self.layout)
        return write_part(self.folder, path, columns, footer, self.compression, values, self.sections)

    def begin(self, accumulator: Accumulator, number: int) -> Writing:
        """Begins one part for each (layer, kind) that holds something, several at a time, the largest first.

        Nobody may add rows meanwhile; those of a part are let go of as soon as it is on disk.
        """
        return Writing(self, accumulator, number)


class Writing:
    """Parts that are being written. Rows that are still in the accumulator in the end could not be written."""

    def __init__(self, writer: PartWriter, accumulator: Accumulator, number: int) -> None:
        self.rows = accumulator
        self._pool = ThreadPoolExecutor(WRITERS, "writer")
        self._parts: list[Future[Part]] = [
            self._pool.submit(self._write, writer, pair, number) for pair in accumulator.by_size()
        ]

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def done(self) -> bool:
        return all(part.done() for part in self._parts)

    def wait(self, seconds: float) -> None:
        """For the next part, at most so long."""
        wait_for([part for part in self._parts if not part.done()], seconds, FIRST_COMPLETED)

    def end(self, told: Callable[[], object] = lambda: None) -> tuple[Sequence[Part], Exception | None]:
        """Waits for all of them: those that were written, and why the first of the others was not.

        Args:
            told: called after each.
        """
        written, failure = [], None
        try:
            for part in self._parts:
                try:
                    written.append(part.result())
                except Exception as error:
                    failure = failure or error
                told()
        finally:
            self.stop()
        return written, failure

    def stop(self) -> None:
        """Waits for the parts in progress only, so that a second Ctrl-C is answered soon."""
        self._pool.shutdown(cancel_futures=True)

    def _write(self, writer: PartWriter, pair: tuple[int, str], number: int) -> Part:
        part = writer.write(self.rows, pair, number)
        self.rows.release(*pair)
        return part
