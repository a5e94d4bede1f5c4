"""What is printed: names that come from files and folders are data, never markup or codes for a terminal.

A folder may be called o[/red], and a checkpoint may have a name that clears the screen and writes "all rows verified".
So whatever is printed is made harmless here, and nowhere else: lines, tables, and what log lines are made of (logs.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import rich
import rich.box
from rich.console import RenderableType
from rich.highlighter import ReprHighlighter
from rich.table import Table
from rich.text import Text

from sniffer.words import printable


def line(text: Any, *, error: bool = False) -> None:
    """Prints a line, on the error stream if it says what went wrong."""
    print(printable(text), file=sys.stderr if error else sys.stdout)


def say(text: Any, style: str = "") -> None:
    """Prints a line for people, never wrapped; in a style where there is a terminal."""
    rich.get_console().print(Text(printable(text), style=style), soft_wrap=True)


@contextmanager
def no_terminal() -> Iterator[None]:
    """For people who read it later: nothing that is printed inside takes a terminal for its own."""
    console = rich.get_console()
    before = console.__dict__
    rich.reconfigure(force_terminal=False)
    try:
        yield
    finally:
        console.__dict__ = before


class Grid(Table):
    """A table whose title, heads and cells are text, whatever they hold."""

    def __init__(self, title: str | None = None, **options: Any) -> None:
        shown = None if title is None else Text(printable(title), style="table.title")
        super().__init__(title=shown, title_justify="left", box=rich.box.SIMPLE, **options)

    def add_column(self, header: RenderableType = "", footer: RenderableType = "", **options: Any) -> None:
        super().add_column(_cell(header), _cell(footer), **options)

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*map(_cell, cells), **options)


def facts_table(title: str, facts: Mapping[str, str], *, fold: bool = False) -> Grid:
    """A line for each fact; with `fold`, names stay in one line and long values are folded, at any width."""
    table = Grid(title=title, show_header=False)
    table.add_column(style="cyan", no_wrap=fold)
    table.add_column(overflow="fold" if fold else "ellipsis")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


HIGHLIGHTER = ReprHighlighter()
"""What rich does with plain cells."""


def _cell(value: RenderableType | None) -> RenderableType:
    return HIGHLIGHTER(Text(printable(value))) if isinstance(value, str) else value or ""
