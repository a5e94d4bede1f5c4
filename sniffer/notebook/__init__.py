"""Capturing in a notebook: `sniff` listens to a model that somebody else calls.

sniffing               the `with sniff(model)` that a user writes
attached               what it needs of a model
listener               the hooks: a call begins, layers attend, rows are kept
under_way              calls that have begun, and not ended
call, masks, pieces    what a call says: its tokens, which are no padding, at which positions
hearing                what it adds, and to which documents
history, caches        what it goes on with, and what became of that meanwhile
batch, example_ids     documents of a call, and their identities
ahead                  which of their positions are kept
attending              what queries do with their keys
summed                 sums over all positions
captured, texts        what has been captured; tables: as frames of polars; saving: as a run
missed                 what was not, and is told
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sniffer.notebook.captured import Captured
    from sniffer.notebook.sniffing import sniff

__all__ = ["Captured", "sniff"]

_HOMES = {"Captured": "sniffer.notebook.captured", "sniff": "sniffer.notebook.sniffing"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
