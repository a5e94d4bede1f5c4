"""The figures that README quotes, as Markdown, from the last results: `python -m benchmarks.quoted`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from benchmarks.__main__ import RESULTS

QUOTED = {
    "overhead": (
        "inside / forward, log_uniform, base_rate 1, 1 x 512",
        "inside / forward, log_uniform, base_rate 1, 1 x 2048",
        "inside / forward, log_uniform, base_rate 1, 4 x 2048",
        "inside / forward, all positions, 1 x 512",
        "inside / forward, all positions, 1 x 2048",
        "inside / forward, all positions, 4 x 2048",
        "loop / bare, the bare loop again, 1 x 2048",
        "loop / bare, log_uniform, base_rate 1, 1 x 2048",
        "loop / bare, all positions, 1 x 2048",
        "loop / bare, hooks on *, 1 x 2048",
        "loop / bare, wrapped attention functions, 1 x 2048",
        "loop / bare, first 3 of 30 layers, 1 x 2048",
        "drawing for *",
    ),
    "peers": ("capture / bare *, 1 x 2048, *", "its seconds / QK-Sniffer's, 1 x 2048, *"),
    "batching": ("four documents a batch / one a batch, mixed lengths",),
    "storage": (
        "writing everything / one forward at 1 x 2048, processor time",
        "bytes / one default file per head",
        "bytes per bfloat16 value, stored as float32",
    ),
    "reading": ("one head of * / a default file per head", "first * positions, q of a layer / default files"),
    "heap": ("freed memory kept / given back, a forward at 1 x 2048",),
    "end_to_end": (
        "everything captured / plain transformers, processor time",
        "nothing captured / plain transformers, processor time",
        "everything / nothing captured, processor time",
        "peak memory above the model / *",
    ),
    "long_context": ("slope of peak memory over 8k, 16k, 32k tokens", "peak memory at 128k * mask of *"),
}
"""By suite, patterns of names; processor times only where a pattern asks for them."""

CPU = ", processor time"


def main() -> int:
    if not RESULTS.exists():
        print(f"{RESULTS} is not there: run `make bench` first", file=sys.stderr)
        return 1
    print("\n".join(lines(json.loads(RESULTS.read_text(encoding="utf-8")))))
    return 0


def lines(results: dict[str, Any]) -> Iterator[str]:
    """A table, and what it was measured on; suites without results are left out."""
    yield "| figure | median | lowest to highest | limit |"
    yield "|---|---|---|---|"
    for suite, patterns in QUOTED.items():
        figures = results.get(suite, {}).get("figures", [])
        for pattern in patterns:
            for one in figures:
                if fnmatchcase(one["name"], pattern) and one["name"].endswith(CPU) == pattern.endswith(CPU):
                    yield _row(one)
    on = [results[suite]["on"] for suite in QUOTED if suite in results]
    for at in {(it["processor"], it["cores"], it["gpu"], it["torch"], it["transformers"]): None for it in on}:
        processor, cores, gpu, torch, transformers = at
        device = f", {gpu}" if gpu else ""
        yield f"\nOn {cores} cores ({processor}){device}, torch {torch}, transformers {transformers}."


def _row(one: dict[str, Any]) -> str:
    limit = "" if one["limit"] is None else f"{one['limit']:.3g}{'' if one['met'] else ' (missed)'}"
    spread = f"{one['low']:.3g} to {one['high']:.3g}" if one["n"] > 1 else ""
    return f"| {one['name']} | {one['value']:.3g} | {spread} | {limit} |"


if __name__ == "__main__":
    sys.exit(main())
