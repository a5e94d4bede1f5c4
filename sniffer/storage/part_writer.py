"""From accumulated rows to parts: what a part's name and footer say follows from the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from sniffer.forward.accumulator import Accumulator
from sniffer.sampler import Picker, describe
from sniffer.storage.layout import RunFolder
from sniffer.storage.schema import Footer, Part
from sniffer.storage.writer import write_part
from sniffer.types import KIND, AttentionLayout, LayerGeometry, columns_of

WRITERS = min(4, os.cpu_count() or 1)
"""Parts written at a time; each holds one span of one head beside the captured rows."""

Progress = Callable[[int], AbstractContextManager[Callable[[], object]]]
"""Given how many parts there are to write: a context, which yields what is called after each."""


def unseen(_: int) -> AbstractContextManager[Callable[[], object]]:
    return nullcontext(lambda: None)


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

    def write_all(
        self,
        accumulator: Accumulator,
        numbers: Mapping[tuple[int, str], int],
        told: Callable[[Part | None], None],
    ) -> None:
        """One part for each (layer, kind) of `numbers`, several at a time.

        Args:
            told: called here with each part once it is written, or with None if it could not be.

        Raises:
            CaptureError: as `write`, after all others were tried.
        """
        failure: Exception | None = None
        pool = ThreadPoolExecutor(WRITERS, "writer")
        try:
            parts = [pool.submit(self.write, accumulator, pair, number) for pair, number in numbers.items()]
            for writing in parts:
                try:
                    told(writing.result())
                except Exception as error:
                    failure = failure or error
                    told(None)
        finally:
            # Waits for the parts in progress only, so that a second Ctrl-C is answered soon.
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure
