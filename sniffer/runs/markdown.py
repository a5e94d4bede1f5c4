"""Text of others in a page of Markdown: names of models, files and sections, whatever they hold, are only text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sniffer.words import printable

MEANT = re.compile(r"([\\`*\[\]|~$])|(?<![A-Za-z0-9])(_)|(_)(?![A-Za-z0-9])")
"""What Markdown, its tables and its formulas take for more than a character. An underscore within a word is none."""

SCHEME = re.compile(r"(?i)\b(https?|ftp|mailto|xmpp|www)(?=[:.])")


def escaped(value: Any) -> str:
    """A value as text in one line: no markup, no HTML, no link, no cell of its own."""
    text = html.escape(printable(value), quote=False)
    # A zero-width joiner would be copied along; an entity is not.
    return SCHEME.sub(lambda found: f"{found[0][0]}<!-- -->{found[0][1:]}", MEANT.sub(r"\\\1\2\3", text))


def table(titles: Sequence[Any], lines: Iterable[Sequence[Any]]) -> str:
    """A table of escaped cells; those that are numbers stand to the right."""
    rows = [list(line) for line in lines]
    right = ["---:" if rows and all(isinstance(row[n], int | float) for row in rows if n < len(row)) else "---"
             for n in range(len(titles))]  # fmt: skip
    cells = [titles, *(row + [""] * (len(titles) - len(row)) for row in rows)]
    shown = [f"| {' | '.join(map(_cell, row))} |" for row in cells]
    return "\n".join([shown[0], f"| {' | '.join(right)} |", *shown[1:]])


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else escaped(value)
