"""Runs the benchmarks, prints a table as each suite ends, and keeps the figures as JSON and as a picture.

Every figure is a ratio within one process or between interleaved runs, unless it has a unit. Suites that need
whole runs repeat them less often; the table's column n says how often. The peers need environments of their own,
so that suite runs only when it is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import rich.box
from rich.table import Table

from benchmarks.drawing import draw
from benchmarks.measure import Figure, circumstances
from sniffer.terminal.tables import show_table

SUITES = {
    "overhead": "what capturing adds to the forward pass",
    "attention": "exact statistics of attention, beside the forward",
    "moments": "sums over all positions, beside the forward",
    "generate": "live capture, beside transformers' own generation",
    "heap": "freed memory kept for the next forward, on a CPU",
    "batching": "documents of mixed lengths together",
    "storage": "writing, against one default file per head",
    "reading": "reading back, against one default file per head",
    "batches": "reading for training, against pyarrow alone",
    "end_to_end": "whole runs: 40 documents",
    "committing": "what commits cost while a run goes on",
    "ceiling": "how fast the host could go: a backbone that costs nothing",
    "growth": "with documents, layers and length",
    "long_context": "up to 128k tokens",
    "compiled": "model.compile=true",
    "gpu": "a GPU kept busy, where there is one",
    "vllm": "engine=vllm beside vLLM alone, in an environment with vLLM",
    "peers": "other tools, each in an environment of its own",
}
WHOLE_RUNS = ("committing", "growth", "long_context")
"""Their repeats are several whole runs, and far less noisy than a forward: a third of the repeats is enough."""

ON_REQUEST = ("peers", "vllm")
RESULTS = Path("outputs") / "benchmarks.json"
DRAWN = find_spec("matplotlib") is not None
"""Whether there is a picture too: an environment for vLLM has nothing that draws."""


def main() -> int:
    names = ", ".join(SUITES)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {names}; without names all but peers and vllm")
    parser.add_argument("--repeats", type=int, default=7, help="medians are of so many")
    arguments = parser.parse_args()
    if set(arguments.suites) - set(SUITES) or arguments.repeats < 1:
        parser.error(f"choose suites from {names}, and 1 repeat or more")
    found: dict[str, list[Figure]] = {}
    for name in arguments.suites or [name for name in SUITES if name not in ON_REQUEST]:
        repeats = -(-arguments.repeats // 3) if name in WHOLE_RUNS else arguments.repeats
        found[name] = import_module(f"benchmarks.{name}").measure(repeats)
        show_table(table(found[name], f"{name}: {SUITES[name]}"))
        keep(name, found[name])
    figures = [one for these in found.values() for one in these]
    held, missed = [one for one in figures if one.met is not None], [one for one in figures if one.met is False]
    places = f"{RESULTS} and {RESULTS.with_suffix('.png')}" if DRAWN else str(RESULTS)
    print(f"{len(held) - len(missed)} of {len(held)} limits met; figures in {places}")
    for one in missed:
        print(f"MISSED {one.name}: {one.value:.4g}, limit {one.limit:.4g}")
    return 1 if missed else 0


def keep(name: str, figures: list[Figure]) -> None:
    """Results of other suites stay as they were."""
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    kept = kept if isinstance(kept, dict) else {}
    kept[name] = {"on": circumstances(), "figures": [asdict(one) | {"met": one.met} for one in figures]}
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    fields = Figure.__dataclass_fields__
    every = [one for name in SUITES if name in kept for one in kept[name]["figures"]]
    if DRAWN:
        draw([Figure(**{name: one[name] for name in fields}) for one in every], RESULTS.with_suffix(".png"))


def table(figures: list[Figure], title: str) -> Table:
    grid = Table(box=rich.box.SIMPLE, title=title, title_justify="left")
    grid.add_column("figure", overflow="fold")
    for name in ("median", "lowest to highest", "n", "limit"):
        grid.add_column(name, justify="right", no_wrap=True)
    for one in figures:
        limit = "" if one.limit is None else f"<= {one.limit:.4g} {'met' if one.met else 'MISSED'}"
        spread = f"{one.low:.4g} to {one.high:.4g}" if one.n > 1 else ""
        grid.add_row(one.name, f"{one.value:.4g} {one.unit}".strip(), spread, str(one.n), limit)
    return grid


if __name__ == "__main__":
    sys.exit(main())
