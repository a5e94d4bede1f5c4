"""QK-Sniffer captures the query and key vectors that a transformer attends with.

`open_run` reads what a run wrote; it is imported when first asked for, so that importing the package
costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sniffer.reader import open_run

__all__ = ["open_run"]


def __getattr__(name: str) -> Any:
    if name == "open_run":
        from sniffer.reader import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
