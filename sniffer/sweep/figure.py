"""What a sweep cost, as a figure: rows, bytes and seconds against the swept keys. sweep.png and sweep.svg.

Along the axis goes the first swept key that is a number; each combination of the others is a line. Where no key
is a number, jobs stand side by side. matplotlib is optional.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from sniffer.reader.index import swept
from sniffer.storage.durable import durable_file
from sniffer.words import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

PANELS = ("rows", "bytes", "seconds")
FORMATS = ("png", "svg")


def draw_sweep(jobs: pl.DataFrame, folder: Path) -> None:
    """Draws the jobs that have rows into `folder`, if matplotlib is installed; one log line if it is not."""
    keys = swept(jobs)
    captured = jobs.filter(pl.col("rows").is_not_null())
    if not keys or captured.is_empty():
        return
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no sweep.png: matplotlib is not installed")
        return
    # The same figure gives the same SVG: its inner names are drawn from this rather than at random.
    with matplotlib.rc_context({"svg.hashsalt": "qk-sniffer"}):
        figure = Figure(figsize=(11.0, 3.6), layout="constrained")
        panels: Any = figure.subplots(1, len(PANELS))
        along = next((key for key in keys if captured[key].dtype.is_numeric()), None)
        for axes, value in zip(panels, PANELS, strict=True):
            _panel(axes, captured, value, along, [key for key in keys if key != along])
        if len(lines := panels[0].get_legend_handles_labels()[1]) > 1:
            figure.legend(lines, loc="outside lower center", ncols=3, fontsize="small")
        for suffix in FORMATS:
            drawn = io.BytesIO()
            figure.savefig(drawn, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            with durable_file(folder / f"sweep.{suffix}") as file:
                file.write(drawn.getvalue())


def _panel(axes: Axes, jobs: pl.DataFrame, value: str, along: str | None, others: list[str]) -> None:
    if along is None:
        labels = [_label(job, others) for job in jobs.iter_rows(named=True)]
        axes.bar(range(len(labels)), jobs[value].to_list())
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize="small")
    else:
        for label, line in _lines(jobs.sort(along), others):
            axes.plot(line[along].to_list(), line[value].to_list(), marker="o", label=label)
        axes.set_xlabel(along)
    axes.set_ylabel(value)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _lines(jobs: pl.DataFrame, others: list[str]) -> Iterator[tuple[str, pl.DataFrame]]:
    """The jobs of each combination of the other keys, in the order of the jobs."""
    if not others:
        yield "", jobs
        return
    for line in jobs.partition_by(others, maintain_order=True):
        yield _label(line.row(0, named=True), others), line


def _label(job: dict[str, Any], keys: list[str]) -> str:
    label = ", ".join(f"{key.rpartition('.')[2]}={job[key]}" for key in keys)
    # What lies between two dollars would be set as a formula, or be none.
    return printable(label).replace("$", r"\$")
