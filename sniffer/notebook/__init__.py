"""Capturing in a notebook: `sniff` listens to a model that somebody else calls.

sniffing              the `with sniff(model)` that a user writes
listener              the hooks: a call begins, layers attend, rows are kept
call, batch           which documents a call holds, at which positions
history, example_ids  what goes on with an earlier call, and whose rows they are
missed                what was not captured, and is told
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sniffer.notebook.sniffing import Captured, sniff

__all__ = ["Captured", "sniff"]

_HOMES = dict.fromkeys(("Captured", "sniff"), "sniffer.notebook.sniffing")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
