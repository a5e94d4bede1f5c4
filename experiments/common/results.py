"""What an analysis leaves: tidy tables (Parquet), figures (PNG and SVG) and a few sentences.

They lie in RUN/experiments/NAME by default, beside the run and never among its own files. provenance.json
says which rows and settings they come from.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import polars as pl
from matplotlib.figure import Figure

from sniffer.errors import CaptureError, RunError
from sniffer.process.environment import commit, now
from sniffer.reader.job_folders import is_sweep
from sniffer.reader.run import Run
from sniffer.storage.durable import durable_file
from sniffer.storage.ownership import is_run, refuse_links

FINDINGS = "findings.txt"
PROVENANCE = "provenance.json"
PAGE = "report.html"
MARKS = (PROVENANCE, PAGE)
"""Files that tell a folder of results."""


@dataclass(frozen=True)
class Result:
    """`tables` and figures by file name without its ending; `findings` are sentences.

    `drawing` makes the figures, or is them: whoever wants the numbers alone, many times over, has none drawn.
    """

    tables: Mapping[str, pl.DataFrame]
    findings: Sequence[str]
    drawing: Mapping[str, Figure] | Callable[[], Mapping[str, Figure]] = field(default_factory=dict)

    @cached_property
    def figures(self) -> Mapping[str, Figure]:
        return self.drawing() if callable(self.drawing) else self.drawing


def folder_of(run: Path, name: str) -> Path:
    """Where the results of an analysis lie by default."""
    return run / "experiments" / name


def save(result: Result, folder: Path, run: Run, analysis: Any) -> None:
    """Writes a result of one run, as `write` does."""
    write(result, folder, _provenance(run, analysis))


def write(result: Result, folder: Path, provenance: Mapping[str, Any]) -> None:
    """Writes a result and what it comes from; an earlier one of the same analysis is replaced file by file.

    Raises:
        RunError: the folder cannot be written to.
    """
    for name, table in result.tables.items():
        content = io.BytesIO()
        table.write_parquet(content)
        put(folder, f"{name}.parquet", content.getvalue())
    for name, figure in result.figures.items():
        put(folder, f"{name}.png", _drawn(figure, format="png", dpi=150))
        # Without a date in it, the same figure is the same file.
        put(folder, f"{name}.svg", _drawn(figure, format="svg", metadata={"Date": None}))
    put(folder, FINDINGS, ("\n".join(result.findings) + "\n").encode())
    put(folder, PROVENANCE, (json.dumps(provenance, indent=2, default=str) + "\n").encode())


def put(folder: Path, name: str, content: bytes) -> None:
    """Writes a file of a result as a whole; what was there under its name is replaced, and never written through.

    Raises:
        RunError: the folder cannot be written to.
    """
    try:
        with durable_file(folder / name) as file:
            file.write(content)
    except CaptureError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise RunError(f"could not write {folder}: {reason}; choose another folder with out=...") from error


def refuse_place(folder: Path) -> None:
    """Raises RunError where results would leave a run's folder through a link, or lie among someone's own files."""
    owner = next((place for place in folder.parents if is_run(place) or is_sweep(place)), None)
    if owner is not None:
        refuse_links(owner, folder)
    usual = owner is not None and folder == folder_of(owner, folder.name)
    if not usual and folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in MARKS):
        raise RunError(f"{folder} holds what is no result of ours: choose a new or an empty folder with out=...")


def _drawn(figure: Figure, **options: Any) -> bytes:
    content = io.BytesIO()
    # The same figure gives the same SVG: its inner names are drawn from this rather than at random.
    with matplotlib.rc_context({"svg.hashsalt": "qk-sniffer"}):
        figure.savefig(content, **options)
    return content.getvalue()


def of_runs(analysis: Any, runs: Mapping[str, Run]) -> dict[str, Any]:
    """The provenance of what is said of several runs, by what each is called there."""
    named = {label: {"folder": run.folder.name, "digest": run.manifest.digest} for label, run in runs.items()}
    return {**_provenance(next(iter(runs.values())), analysis), "runs": named}


def _provenance(run: Run, analysis: Any) -> dict[str, Any]:
    return {
        "analysis": type(analysis).__name__,
        "settings": asdict(analysis),
        "run": run.folder.name,
        "run_digest": run.manifest.digest,
        "run_status": run.manifest.status,
        "created": now(),
        "commit": commit(),
    }


def head_columns(layer: int, heads: Sequence[int], **columns: Any) -> pl.DataFrame:
    """One row per head: layer, head, then the columns, each with one value per head."""
    return pl.DataFrame({"layer": [layer] * len(heads), "head": list(heads), **columns}).with_columns(
        pl.col("layer", "head").cast(pl.Int16)
    )


def middle(values: pl.Series) -> float:
    """The median, for a sentence."""
    return float(values.cast(pl.Float64).median() or 0.0)  # type: ignore[arg-type]
