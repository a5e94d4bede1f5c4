"""What an analysis leaves: tidy tables (Parquet), figures (PNG and SVG) and a few sentences.

They lie in RUN/experiments/NAME by default, beside the run and never among its own files. provenance.json
says which rows and settings they come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from matplotlib.figure import Figure

from sniffer.environment import commit, now
from sniffer.errors import RunError
from sniffer.reader import Run

FINDINGS = "findings.txt"
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Result:
    """`tables` and `figures` by file name without its ending; `findings` are sentences."""

    tables: Mapping[str, pl.DataFrame]
    findings: Sequence[str]
    figures: Mapping[str, Figure] = field(default_factory=dict)


def folder_of(run: Path, name: str) -> Path:
    """Where the results of an analysis lie by default."""
    return run / "experiments" / name


def save(result: Result, folder: Path, run: Run, analysis: Any) -> None:
    """Writes a result; an earlier one of the same analysis is replaced file by file.

    Raises:
        RunError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in result.tables.items():
            table.write_parquet(folder / f"{name}.parquet")
        for name, figure in result.figures.items():
            # Without a date in it, the same figure is the same file.
            figure.savefig(folder / f"{name}.png", dpi=150)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        (folder / FINDINGS).write_text("\n".join(result.findings) + "\n", encoding="utf-8")
        (folder / PROVENANCE).write_text(json.dumps(_provenance(run, analysis), indent=2, default=str) + "\n")
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> RunError:
    return RunError(f"could not write {folder}: {error.strerror}; choose another folder with out=...")


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
