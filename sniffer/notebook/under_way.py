"""Calls of a model that are under way, and those within them that have ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from sniffer.forward.observer import Observer
from sniffer.notebook.batch import CallBatch, CallRows
from sniffer.notebook.call import Arguments, Call
from sniffer.notebook.hearing import Heard
from sniffer.types import Picks

if TYPE_CHECKING:
    from sniffer.tap import Tap


@dataclass(frozen=True)
class Whole:
    """A call that has ended well, within one that has not ended yet."""

    call: Call
    heard: Heard
    rows: CallRows
    cache: Any


@dataclass
class Frame:
    """A call under way."""

    module: nn.Module
    said: Arguments
    error: BaseException | None
    """What was being handled when it began; another one at its end is its own."""
    pending: list[Whole] = field(default_factory=list)
    call: Call | None = None
    heard: Heard | None = None
    batch: CallBatch | None = None
    picks: Mapping[tuple[int, str], Picks] = field(default_factory=dict)
    observer: Observer | None = None
    before: Tap | None = None
    blamed: bool = False
    """Whether a call within it has failed, and is counted."""
