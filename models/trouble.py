"""What a device refuses while a model comes to it, or is tried on it, in one line that says what helps there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sniffer.errors import AT_START, device_trouble


@contextmanager
def told(doing: str) -> Iterator[None]:
    """Turns the errors of a device into one line; others go on their way.

    Args:
        doing: such as "while the model was loaded".

    Raises:
        CaptureError: memory has run out, or the device has failed.
    """
    try:
        yield
    except Exception as error:
        if (trouble := device_trouble(error, doing, AT_START)) is not None:
            raise trouble from error
        raise
