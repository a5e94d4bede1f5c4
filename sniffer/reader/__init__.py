"""Reading runs back: `open_run` gives a Run (run.py), or a Sweep of several (sweep.py), as polars frames.

scan          parts as frames, only what is asked for
job_folders   which folders are the jobs of a sweep
index         sweep.parquet, a row a job
training/     all rows in batches, again and again
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sniffer.reader.run import Pairs, Run, Vectors
    from sniffer.reader.sweep import Sweep, open_run

__all__ = ["Pairs", "Run", "Sweep", "Vectors", "open_run"]

_HOMES = {
    **dict.fromkeys(("Pairs", "Run", "Vectors"), "sniffer.reader.run"),
    **dict.fromkeys(("Sweep", "open_run"), "sniffer.reader.sweep"),
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
