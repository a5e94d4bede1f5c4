"""Where a run's model comes from: loaded anew, or left there by the job before.

The jobs of a sweep that run in one process one after the other mostly want the same model. It is kept for as
long as the next job's checkpoint has the same value, and let go of before another one is loaded, so that there
is never more than one in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from sniffer.types import Backbone, Checkpoint

Load = Callable[[Checkpoint], Backbone]


def load_anew(checkpoint: Checkpoint) -> Backbone:
    """What a single run does."""
    return checkpoint.load()


class LastModel:
    """The model that was loaded last, for whoever wants the same again."""

    def __init__(self) -> None:
        self._of: Checkpoint | None = None
        self._described: dict[str, Any] = {}
        self._backbone: Backbone | None = None

    def load(self, checkpoint: Checkpoint) -> Backbone:
        """The checkpoint's model, loaded unless it is the last one, from files that are still what they were."""
        # A headed one equals the same without its head; a checkpoint class of a user's own may have none.
        headed = [getattr(one, "headed", False) for one in (checkpoint, self._of)]
        same = checkpoint == self._of and headed[0] == headed[1]
        if self._backbone is None or not same or checkpoint.describe() != self._described:
            self.clear()
            self._backbone = checkpoint.load()
            self._of, self._described = checkpoint, checkpoint.describe()
        return self._backbone

    def clear(self) -> None:
        """Lets go of the model, and waits until its memory is free."""
        self._of = self._backbone = None
        # Modules refer to one another in circles, which only the collector frees.
        gc.collect()
