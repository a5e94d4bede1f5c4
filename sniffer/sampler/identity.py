"""Numbers that stand for documents, and seed their draws: in a notebook, where no dataset has given them."""

from __future__ import annotations

from sniffer.hashing import key_of, stable_id

__all__ = ["branch_id", "stable_id"]


def branch_id(parent: int, position: int, number: int) -> int:
    """The 63-bit example id of a text that parts from another one, the `number`-th that does so at this position."""
    return key_of("branch", parent, position, number) >> 1
