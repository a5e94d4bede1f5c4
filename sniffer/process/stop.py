"""Ctrl-C and SIGTERM, politely: the batch that is running is finished, and what was captured is written.

The first signal only asks. It is answered where nothing can be lost: before the next batch, or at once
while the run loads its model or waits for text. A second signal stops at once, wherever the run is; what
was committed before that is safe, as it would be after a kill.

When the terminal is closed or the connection to it lost, the run stops in the same way, and its output goes nowhere:
whatever would write to the terminal would fail. A run that ignores that (nohup) goes on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
HANG_UP: int | None = getattr(signal, "SIGHUP", None)
"""Windows has none."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stop:
    """While open, turns the signals into a request to stop. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            if HANG_UP is not None and signal.getsignal(HANG_UP) != signal.SIG_IGN:
                self._terminals = [output for output in (1, 2) if os.isatty(output)]
                self._before[HANG_UP] = signal.signal(HANG_UP, self._hang_up)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Stopped if a signal has asked for it."""
        if self.asked is not None:
            raise Stopped(self.asked)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Where there is nothing to lose: a signal is raised as it comes."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a signal comes; waiting for the next one is given up at once."""
        iterator = iter(items)
        while True:
            with self.at_once():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signum
        if self._at_once:
            raise Stopped(signum)
        # Not through logging or print, which this signal may have interrupted half way.
        with suppress(OSError):
            os.write(2, b"\nstopping after this batch, then writing what was captured; once more stops at once\n")

    def _hang_up(self, signum: int, frame: FrameType | None) -> None:
        # A shell and the kernel may each send one: the second asks for nothing new.
        if self.asked is not None:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for output in self._terminals:
            os.dup2(nowhere, output)
        os.close(nowhere)
        self._handle(signum, frame)
