"""Runs every benchmark, prints one table and keeps the figures as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import rich
import rich.box
from rich.table import Table

from benchmarks import memory, overhead, storage
from benchmarks.measure import Figure

SUITES = {"overhead": overhead.measure, "storage": storage.measure, "memory": memory.measure}
RESULTS = Path("outputs") / "benchmarks.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--repeats", type=int, default=7, help="medians are of so many (memory: a third)")
    arguments = parser.parse_args()
    unknown = set(arguments.suites) - set(SUITES)
    if unknown or arguments.repeats < 1:
        parser.error(f"choose suites from {', '.join(SUITES)}, and 1 repeat or more")
    figures: list[Figure] = []
    for name in arguments.suites or SUITES:
        # A memory repeat is two whole runs, and far less noisy than a time.
        repeats = max(1, arguments.repeats // 3) if name == "memory" else arguments.repeats
        figures += SUITES[name](repeats)
    rich.print(table(figures))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([asdict(f) | {"met": f.met} for f in figures], indent=2) + "\n")
    missed = [f.name for f in figures if f.met is False]
    print(f"figures: {RESULTS}; limits missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def table(figures: list[Figure]) -> Table:
    grid = Table(box=rich.box.SIMPLE, title="medians (lowest to highest)", title_justify="left")
    for name, justify in (("figure", "left"), ("median", "right"), ("spread", "right"), ("limit", "right")):
        grid.add_column(name, justify=justify)  # type: ignore[arg-type]
    for f in figures:
        limit = "" if f.limit is None else f"<= {f.limit:g} {'met' if f.met else 'MISSED'}"
        grid.add_row(f.name, f"{f.value:.4f} {f.unit}".strip(), f"{f.low:.4f} to {f.high:.4f}", limit)
    return grid


if __name__ == "__main__":
    sys.exit(main())
