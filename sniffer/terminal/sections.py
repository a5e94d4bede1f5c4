"""How much of a run each section of its documents is: tokens, and rows by kind."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from sniffer.storage.example_sections import tokens_by_section
from sniffer.storage.examples import examples_table
from sniffer.storage.manifest import Manifest
from sniffer.terminal.printing import Grid
from sniffer.types import NONE

MAX_LINES = 24
IN_NONE = "(none)"


def section_table(folder: Path, manifest: Manifest) -> Table | None:
    """The largest sections first, tokens of no section last; None for a run without sections, or yet without documents.

    Raises:
        OSError, ValueError: examples.parquet cannot be read.
    """
    if not manifest.has_sections or manifest.examples is None:
        return None
    tokens = tokens_by_section(examples_table(folder / manifest.examples.path, manifest.examples))
    rest = manifest.counts.get("tokens", 0) - sum(tokens.values())
    ordered = sorted(tokens.items(), key=lambda pair: (-pair[1], pair[0]))
    rows = manifest.rows_by_section
    table = Grid(title="vectors by section")
    table.add_column("section")
    for title in ("tokens", *(manifest.rows_by_kind if rows is not None else ())):
        table.add_column(title, justify="right")
    for name, count in [*ordered[:MAX_LINES], *([(NONE, rest)] if rest else [])]:
        kinds = () if rows is None else (rows.get(name, {}).get(kind, 0) for kind in manifest.rows_by_kind)
        table.add_row(name or IN_NONE, f"{count:,}", *(f"{number:,}" for number in kinds))
    if len(ordered) > MAX_LINES:
        table.add_row(f"{len(ordered) - MAX_LINES:,} more", f"{sum(count for _, count in ordered[MAX_LINES:]):,}")
    return table
