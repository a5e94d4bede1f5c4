"""Analyses of captures. They may import anything; nothing imports them."""

from __future__ import annotations

import os
import sys
from types import TracebackType


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A package that an analysis needs and that is not there, in one line; all else as Python tells it."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    told = issubclass(kind, ModuleNotFoundError) and name not in ("", "sniffer")
    if not told or os.environ.get("HYDRA_FULL_ERROR") == "1":
        sys.__excepthook__(kind, error, trace)
    else:
        from sniffer.terminal.printing import line

        line(f"analyses need {name}, which is not installed: pip install 'qk-sniffer[experiments]'", error=True)


# The algebra is of many small matrices, over which threads of BLAS mostly wait for each other: with one, an analysis
# takes half to a quarter of the processor time, and no longer by the clock. BLAS reads this as numpy is loaded. "-m"
# stands there while Python looks for what `python -m sniffer.experiments` is; an import by other code changes nothing.
if sys.argv[:1] == ["-m"]:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # They are imported before any code of an analysis could meet an error.
    sys.excepthook = tell
