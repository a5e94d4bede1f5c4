"""How much of a run each section of its documents is: tokens, and rows by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from sniffer.storage.example_sections import tokens_by_section
from sniffer.storage.examples import examples_table
from sniffer.storage.manifest import Manifest
from sniffer.terminal.printing import Grid
from sniffer.types import NONE

MAX_LINES = 24
"""Sections that are listed; of more, the largest."""

IN_NONE = "(none)"


def by_section(folder: Path, manifest: Manifest) -> tuple[list[str], list[list[Any]]] | None:
    """Titles and lines of a table: name, tokens, and rows by kind unless the sections are too many to be counted by.

    The largest sections come first, tokens of no section after them, and how many more there are last. None for a run
    without sections, or yet without documents.

    Raises:
        OSError, ValueError: examples.parquet cannot be read.
    """
    if not manifest.has_sections or manifest.examples is None:
        return None
    tokens = tokens_by_section(examples_table(folder / manifest.examples.path, manifest.examples))
    rest = manifest.counts.get("tokens", 0) - sum(tokens.values())
    ordered = sorted(tokens.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = manifest.rows_by_section
    kinds = [] if rows is None else list(manifest.rows_by_kind)
    lines: list[list[Any]] = [
        [name or IN_NONE, count, *((rows or {}).get(name, {}).get(kind, 0) for kind in kinds)]
        for name, count in [*ordered[:MAX_LINES], *([(NONE, rest)] if rest else [])]
    ]
    if len(ordered) > MAX_LINES:
        lines.append([f"{len(ordered) - MAX_LINES:,} more", sum(count for _, count in ordered[MAX_LINES:])])
    return ["section", "tokens", *kinds], lines


def section_table(folder: Path, manifest: Manifest) -> Table | None:
    """The same for a terminal; raises as `by_section`."""
    if (found := by_section(folder, manifest)) is None:
        return None
    titles, lines = found
    table = Grid(title="vectors by section")
    for title in titles:
        table.add_column(title, justify="left" if title == titles[0] else "right")
    for name, *numbers in lines:
        table.add_row(name, *(f"{number:,}" for number in numbers))
    return table
