"""Files as bytes or lines of text, unpacked on the way where their names end in .gz, .bz2 or .zst."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from sniffer.errors import UnreadableError, first_line, reason

PACKED = ("", ".gz", ".bz2", ".zst")


LEAVE_OUT = "; or leave it out with dataset.skip_unreadable=true"


def unreadable(problem: str) -> UnreadableError:
    """A file that cannot be read, with how to go on without it."""
    return UnreadableError(f"{problem}{LEAVE_OUT}")


def endings(*formats: str) -> tuple[str, ...]:
    """How files of these formats may end, packed ones too."""
    return tuple(f"{ending}{packed}" for packed in PACKED for ending in formats)


def is_packed(file: Path) -> bool:
    return file.suffix in PACKED[1:]


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A stream of a file's bytes, unpacked.

    Raises:
        UnreadableError: also inside, where a file is cut short or damaged, or no UTF-8 where text is read from it.
    """
    try:
        if not is_packed(file):
            with file.open("rb") as plain:
                yield plain
            return
        import pyarrow

        with pyarrow.input_stream(str(file), compression="detect") as stream:
            yield cast(BinaryIO, io.BufferedReader(stream))
    except UnicodeDecodeError as error:
        raise unreadable(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    except OSError as error:
        raise unreadable(f"{file} cannot be read: {reason(error)}") from error
    except ValueError as error:  # of pyarrow, where packed bytes are damaged
        raise unreadable(f"{file} cannot be read: {first_line(error)}") from error


def read_text(file: Path) -> str:
    """All of a file's text, to the byte; without a byte order mark.

    Raises:
        UnreadableError: as `opened`.
    """
    with opened(file) as stream:
        return stream.read().decode("utf-8-sig")


def lines(file: Path) -> Iterator[str]:
    """A file's lines, their ends included.

    Raises:
        UnreadableError: as `opened`.
    """
    with opened(file) as stream:
        yield from io.TextIOWrapper(stream, encoding="utf-8-sig")
