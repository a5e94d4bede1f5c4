"""Tables for people, on a terminal and elsewhere."""

from __future__ import annotations

import rich
from rich.console import Console
from rich.table import Table

TABLE_WIDTH = 180
"""Of tables with many columns that go to a file or a pipe, where nobody's terminal breaks them."""


def show_table(table: Table) -> None:
    """Prints a table for people, as wide as it needs to be where there is no terminal."""
    console = rich.get_console()
    (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(table)
