"""Every error this project raises on purpose.

    SnifferError                 shown to the user as one line, exit code 1
    ├── ConfigError              a key has a value that cannot be used
    ├── DatasetError             text is missing, unreadable, empty or wrongly identified
    ├── CheckpointError          a model or tokenizer cannot be had
    ├── UnsupportedModelError    a model cannot be tapped soundly
    ├── CaptureError             a run cannot start or go on (memory, disk)
    └── RunError                 a run folder is broken, foreign, or already holds results

A message says what was found, what was wanted and what to do now, in one line. Hydra prints a
CompactHydraException without a traceback, which is why the root derives from it.
"""

from hydra.errors import CompactHydraException


class SnifferError(CompactHydraException):
    """Root of all errors meant for the person at the terminal."""


class ConfigError(SnifferError):
    """A configuration key has a value that cannot be used."""


class DatasetError(SnifferError):
    """Text is missing, unreadable, empty or wrongly identified."""


class CheckpointError(SnifferError):
    """A model or tokenizer cannot be had: not found, gated, offline, incomplete."""


class UnsupportedModelError(SnifferError):
    """A model cannot be tapped soundly; nothing is captured from it."""


class CaptureError(SnifferError):
    """A run cannot start or go on, for want of memory or disk."""


class RunError(SnifferError):
    """A run folder is broken, foreign, or already holds results."""


def first_line(error: BaseException, lines: int = 1) -> str:
    """What an error of someone else's code says first, in one line; its class where it says nothing."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines]) or type(error).__name__


def unbroken(error: BaseException) -> str:
    """All that an error says, without its line breaks; nothing where it says nothing."""
    return " ".join(str(error).split())


def reason(error: OSError) -> str:
    """Why the system refused; libraries raise such errors with words of their own as well."""
    return error.strerror or first_line(error)
