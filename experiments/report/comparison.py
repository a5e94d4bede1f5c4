"""What `compare` left beside the jobs, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from sniffer.reader.run import Run
from sniffer.storage.untrusted import CONFIG_BYTES, read_json, read_text

from ..common.results import FINDINGS, PROVENANCE
from .reading import read_table, short, unreadable

NUMBERS = ("value", "low", "high", "difference", "difference_low", "difference_high")


def comparison(folder: Path, runs: Sequence[Run], about: Any) -> dict[str, Any] | None:
    """Sentences, averages of runs with intervals, and maps of differences; None where nothing was compared.

    `about`: what a statistic of an analysis means.

    Raises:
        RunError: a result cannot be read.
    """
    place = folder / "experiments" / "compare"
    if not (place / FINDINGS).is_file():
        return None
    try:
        sentences = read_text(place / FINDINGS).splitlines()
        told = read_json(place / PROVENANCE, CONFIG_BYTES)["runs"]
        digests = {str(one["folder"]): str(one["digest"]) for one in told.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(place, error) from error
    now = {run.folder.name: run.manifest.digest for run in runs}
    stale = any(now.get(name, digest) != digest for name, digest in digests.items())
    averages, differences = (read_table(place / f"{name}.parquet") for name in ("runs", "differences"))
    statistics = []
    for (analysis, statistic, kind), some in averages.group_by("analysis", "statistic", "kind", maintain_order=True):
        of_heads = differences.filter(analysis=analysis, statistic=statistic, kind=kind)
        maps = {str(label): _map(mine) for (label,), mine in of_heads.group_by("run", maintain_order=True)}
        lines = [
            {"run": run, "heads": heads, **_numbers(rest)}
            for run, heads, *rest in some.select("run", "heads", *NUMBERS).iter_rows()
        ]
        statistics.append(
            {
                "analysis": analysis,
                "name": statistic,
                "kind": kind or None,
                "about": about(str(analysis), str(statistic)),
            }
            | {"label": str(statistic).replace("_", " ") + (f" of {kind}" if kind else ""), "runs": lines, "maps": maps}
        )
    return {"sentences": sentences, "stale": stale, "statistics": statistics}


def _numbers(values: Sequence[Any]) -> dict[str, Any]:
    return {name: short(value) for name, value in zip(NUMBERS, values, strict=True)}


def _map(differences: pl.DataFrame) -> dict[str, Any]:
    layers, heads = (differences[column].unique().sort().to_list() for column in ("layer", "head"))
    found = {
        (layer, head): rest
        for layer, head, *rest in differences.select("layer", "head", "difference", "low", "high").iter_rows()
    }
    values, low, high = (
        [[short(found[layer, head][place]) if (layer, head) in found else None for head in heads] for layer in layers]
        for place in range(3)
    )
    return {"layers": layers, "heads": heads, "values": values, "low": low, "high": high}
