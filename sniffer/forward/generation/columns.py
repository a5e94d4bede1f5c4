"""Columns: where the tokens of prompts side by side are, and those of each step after them."""

from __future__ import annotations

from typing import NamedTuple


class Columns(NamedTuple):
    """The tokens of one forward: `new` columns from `begin` on, of prompts, or the one of a step."""

    begin: int
    new: int

    @property
    def end(self) -> int:
        return self.begin + self.new
