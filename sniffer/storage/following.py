"""A mirror that follows a run: after each save of the manifest a thread brings the copy to what it says.

The run never waits for it before its end, and nothing that befalls the copy befalls the run. What cannot be reached is
tried again, after a second, two, four and so on; a line says so the first time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sniffer.errors import RunError, SnifferError, first_line, reason
from sniffer.storage.manifest import Manifest
from sniffer.storage.mirror import Mirror, Superseded, catch_up
from sniffer.words import size

log = logging.getLogger(__name__)

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before another try."""

TRIES = 5
"""At the end of a run, one after the other without anything sent in between."""

LOOK_EVERY = 0.1
"""Seconds between two looks at how far the copy is, which a signal may interrupt."""


def wait_after(failed: int) -> float:
    """Seconds before another try, after so many that have failed one after the other."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failed - 1))


def _failed(before: int, mirror: Mirror, sent: int) -> int:
    """Failures one after the other: `before` this one, in which more files than `sent` may have come over."""
    return 1 if mirror.files > sent else before + 1


def bring(mirror: Mirror, manifest: Manifest, content: bytes, pause: Callable[[float], object] = time.sleep) -> None:
    """Brings a copy to what a manifest says, in as many tries as it takes, as long as any of them sends something.

    Raises:
        RunError: there is another run, a file is damaged, or the place cannot be reached after all.
    """
    failed = 0
    while True:
        sent = mirror.files
        try:
            return mirror.bring(manifest, content)
        except Superseded as path:
            raise RunError(
                f"{mirror.folder / str(path)} is missing or damaged: `python -m sniffer.runs resume {mirror.folder}` "
                "mends it"
            ) from None
        except OSError as error:
            failed = _failed(failed, mirror, sent)
            for_good = isinstance(error, FileNotFoundError | PermissionError | TimeoutError) and not mirror.files
            if for_good or failed == TRIES:
                raise RunError(
                    f"{mirror.url} cannot be written to ({reason(error)}): what is there stays whole, and the same "
                    "command goes on; check the address, the network and your access"
                ) from error
            pause(wait_after(failed))


def mirror_of(folder: Path, url: str | None, manifest: Manifest | None, *, keep: bool = True) -> Mirror | None:
    """The mirror that a run is to have, looked at before anything is captured.

    Args:
        manifest: of the session that is taken up; None for a run that begins.
        keep: whether parts stay here once they are there.

    Raises:
        RunError: the URL is of no folder, cannot be written to, or has something else.
    """
    if url is None:
        return None
    try:
        mirror = Mirror(folder, url, keep=keep)
        mirror.check(manifest)
    except RunError as error:
        raise RunError(f"output.mirror={error}") from error
    except OSError as error:
        raise RunError(
            f"output.mirror={url} cannot be written to ({reason(error)}): check the address, the network, your access"
        ) from error
    return mirror


@contextmanager
def following(mirror: Mirror | None) -> Iterator[Callable[[Manifest], None]]:
    """Gives what is to be called with each manifest that is on disk; at the end, waits for the copy, within reason.

    After an interruption, what is left is tried once.
    """
    if mirror is None:
        yield lambda manifest: None
        return
    follow = Following(mirror)
    try:
        yield follow.saved
    except BaseException:
        follow.finish(tries=1)
        raise
    follow.finish(TRIES)


class Following:
    """The thread, and what it is to bring over: always the newest manifest, whatever it has missed."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._newest: Manifest | None = None
        self._there: Manifest | None = None
        self._done_with: Manifest | None = None
        """The last one that is there, or that there is no use in trying again."""
        self._why: str | None = None
        self._warned = False
        self._failed = 0
        self._silent = False
        self._tries: int | None = None
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)
        self._thread.start()

    def saved(self, manifest: Manifest) -> None:
        """A manifest is on disk, with all that it names."""
        with self._wake:
            self._newest = manifest
            self._wake.notify()

    def finish(self, tries: int) -> None:
        """Waits until all is there, or so many tries have failed one after the other; a line says what is missing."""
        with self._wake:
            self._tries, self._failed = tries, 0
            self._wake.notify()
        if self._newest is not self._there:
            log.info("waiting until %s has all of it%s", self._mirror.url, self._left())
        while self._thread.is_alive():
            self._thread.join(LOOK_EVERY)
        if self._newest is self._there:
            if self._newest is not None:
                alone = ", and its vectors alone" if self._mirror.removed else ""
                log.info("%s has all of it%s", self._mirror.url, alone)
            return
        why = f" ({self._why})" if self._why else ""
        command = catch_up(self._mirror.folder, self._mirror.url)
        log.warning("%s lags behind the run%s%s: %s catches up", self._mirror.url, self._left(), why, command)

    def _left(self) -> str:
        return f", {size(self._mirror.left)} to go" if self._mirror.left else ""

    def _follow(self) -> None:
        while (manifest := self._next()) is not None:
            sent = self._mirror.files
            try:
                self._mirror.bring(manifest, manifest.content())
            except Superseded as path:  # by a manifest that is about to be saved, or else by damage: the end will tell
                self._why, self._done_with, self._failed = f"{path} is missing or damaged", manifest, 0
            except SnifferError as error:
                self._warn(str(error))
                self._done_with, self._failed = manifest, 0
            except Exception as error:  # whatever becomes of the copy, the run goes on
                self._failed = _failed(self._failed, self._mirror, sent)
                self._silent = isinstance(error, TimeoutError)
                self._warn(reason(error) if isinstance(error, OSError) else first_line(error))
            else:
                if self._warned:
                    log.info("%s can be written to again", self._mirror.url)
                self._there = self._done_with = manifest
                self._why, self._failed, self._warned = None, 0, False

    def _next(self) -> Manifest | None:
        """What is to be brought over now, once there is something; None where the run has ended and there is not."""
        with self._wake:
            while self._newest is self._done_with and self._tries is None:
                self._wake.wait()
            # Who has not answered for so long is not asked again while somebody waits.
            if self._failed and self._tries is not None and (self._silent or self._failed >= self._tries):
                return None
            if self._failed:  # a newer manifest, or the run's end, is another reason to try
                self._wake.wait(wait_after(self._failed))
            return None if self._newest is self._done_with else self._newest

    def _warn(self, why: str) -> None:
        """Says once that the copy is not what it should be, until it is."""
        if not self._warned:
            log.warning("%s cannot be written to (%s): the run goes on without", self._mirror.url, why)
        self._why, self._warned = why, True
