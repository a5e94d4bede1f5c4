"""Standard output and error, which may be closed, full, or read by nobody any more.

What a command does must not depend on that: a run that is complete is complete, also where `| head` has gone home
before the summary. So what cannot be written is let go, and all that comes after it. A reader who has gone wanted no
more, and is told nothing; that a disk is full is told on standard error.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from sniffer.errors import reason
from sniffer.terminal.printing import line


class Stream:
    """A text stream that drops what it cannot write; `lost` is the error that it met first."""

    def __init__(self, stream: TextIO) -> None:
        self.lost: OSError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for text in lines:
            self.write(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self, error: OSError) -> None:
        self.lost = self.lost or error
        # What is in its buffer would be tried again, and complained about, when Python ends.
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def standard_streams() -> Iterator[Stream]:
    """Lets standard output and error be closed, full or broken inside; yields the first of them.

    Afterwards the streams are those of before, and standard error has been told of an output that was lost, except to
    a reader who had gone.
    """
    _fill_closed()
    before = sys.stdout, sys.stderr
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        if out.lost is not None and is_lost(out):
            line(f"standard output could not be written: {reason(out.lost)}", error=True)
        err.flush()
        sys.stdout, sys.stderr = before


def is_lost(stream: Stream) -> bool:
    """Whether a stream lost what somebody may have wanted."""
    return stream.lost is not None and stream.lost.errno != errno.EPIPE


def _fill_closed() -> None:
    """Points closed standard streams to nowhere. The next files that are opened would take their numbers otherwise,
    and whatever a library prints would go into them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
