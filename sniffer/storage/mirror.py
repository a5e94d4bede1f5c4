"""A copy of a run at a URL: first the files that a manifest names, then that manifest.

So the copy is a run at every moment, one that this run has been: never more than it, and if ours goes on or the copying
is cut off, less. Each file is proven there before a manifest that names it is written. What a copy has already is not
sent again, so whatever was cut off goes on where it was. The log, and what analyses have left, are not copied.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sniffer.errors import CaptureError, RunError
from sniffer.storage.away import away, told
from sniffer.storage.durable import could_not_remove, durable_file
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.remote import RemotePath
from sniffer.storage.schema import FileRecord, Part
from sniffer.storage.target import Sums, Target, target_at
from sniffer.storage.untrusted import read_json
from sniffer.storage.urls import require_url

BESIDE = (RunFolder.CONFIG, RunFolder.RERUN, *(f"{RunFolder.HYDRA}/{name}" for name in RunFolder.HYDRA_RECORD))
"""Small files that no manifest names."""


class Superseded(Exception):  # noqa: N818 - no error: there is a newer manifest
    """A file that a manifest names is not what it says any more."""


class Mirror:
    """The copy of the run in `folder` at `url`. `files` and `bytes` count what was sent, `left` what is yet to go.

    Unless ours are to `keep`, a part that counts is removed from the folder once it is there for sure: proven by its
    checksum, and named by the manifest that is there. `removed` counts those.

    Raises, in all that it does:
        RunError: something else is there, a file of ours is damaged, or a package is missing.
        OSError: the place cannot be reached, or refuses.
    """

    def __init__(self, folder: Path, url: str, *, keep: bool = True) -> None:
        self.folder, self.url, self._keep = folder, require_url(url, ""), keep
        self.files = self.bytes = self.left = self.removed = 0
        self._target: Target = target_at(self.url)
        self._there: dict[str, str] = {}
        self._sums: dict[str, Sums] = {}
        self._theirs: Manifest | None = None
        self._content: bytes | None = None
        self._looked = False

    def check(self, manifest: Manifest | None) -> None:
        """Looks whether the copy can be written, by writing the configuration there.

        Args:
            manifest: of the run; None for one that has not begun.
        """
        self._look(None if manifest is None else manifest.created)
        self._target.make()
        self._bring_beside()
        self._target.settle()

    def bring(self, manifest: Manifest, content: bytes) -> None:
        """Brings the copy to what a manifest says that is on disk.

        Args:
            content: of its file.

        Raises:
            Superseded: what it names is not there any more.
        """
        self._look(manifest.created)
        _refuse_ahead(self.url, self._theirs, manifest)
        self._target.make()
        if not self._keep and self._theirs is None and (manifest.parts or manifest.pending):
            self._claim(manifest)
        documents = None if manifest.examples is None else self._documents(manifest.examples)
        wanted = [record for record in (*manifest.files(), *manifest.pending) if record is not manifest.examples]
        wanted += [] if manifest.model_config is None else [manifest.model_config]
        missing = [record for record in wanted if self._there.get(record.path) != record.sha256]
        unsent = {record.path for record in missing}
        if lost := [part for part in away(self.folder, manifest) if part.path in unsent]:
            raise RunError(_lost(self.url, self.folder, manifest, lost))
        self.left = sum(record.bytes for record in missing)
        for record in missing:
            self._bring_file(record)
            self.left -= record.bytes
        self._bring_beside()
        # In the order in which they are written on disk: one of the twins fits at every moment.
        twins = (RunFolder.EXAMPLES, *RunFolder.MANIFESTS, RunFolder.EXAMPLES_TWIN)
        for path in twins:
            put = documents if path in RunFolder.DOCUMENTS else content
            if put is not None:
                self._put(path, put, Sums.of(put))
        named = {record.path for record in wanted}
        stale = [path for path in self._there if path not in named and RunFolder.is_numbered_file(path)]
        self._target.remove(stale)
        for path in stale:
            del self._there[path]
        self._target.settle()
        self._theirs, self._content = manifest, content
        if not self._keep:
            self._let_go(manifest, content)
        note(self.folder, self.url, content)  # Last, so that who was killed before it goes on with what is left.

    def _claim(self, manifest: Manifest) -> None:
        """Puts a manifest without rows there first: of runs that were given the same place, one goes on."""
        none = replace(
            manifest, parts=(), pending=(), tokens=(), moment_files=(), examples=None, model_config=None, counts={}
        )
        content = none.content()
        self._put(RunFolder.MANIFEST, content, Sums.of(content))
        self._target.settle()
        self._looked = False
        self._look(manifest.created)

    def _let_go(self, manifest: Manifest, content: bytes) -> None:
        """Removes the parts of ours that count and are there; each is asked for once more before it goes."""
        here = [part for part in manifest.parts if (self.folder / part.path).is_file()]
        if here and self._target.read(RunFolder.MANIFEST) != content:
            raise OSError(errno.EIO, f"{RunFolder.MANIFEST} there has become another one", self.url)
        for part in here:
            path = self.folder / part.path
            sums = self._sums.pop(part.path, None) or Sums.of(path)
            if sums.sha256 != part.sha256:
                continue  # damaged here since: verify tells
            if not self._target.holds(part.path, sums):
                self._looked = False
                raise OSError(errno.EIO, f"{part.path} is not there any more as it was sent", self.url)
            try:
                path.unlink()
            except OSError as error:
                raise RunError(could_not_remove(error, path)) from error
            self.removed += 1

    def _look(self, created: str | None) -> None:
        """Learns what is there, unless that is what was left there; raises RunError where it is another's."""
        found = self._target.read(RunFolder.MANIFEST)
        if self._looked and found == self._content:
            return
        sizes = self._target.sizes()
        theirs = None if found is None else _manifest_of(self.url)
        if theirs is not None and theirs.created != created:
            which = "a run already" if created is None else f"another run, which was begun at {theirs.created}"
            raise RunError(f"{self.url} holds {which}: choose another URL, one for each run")
        if foreign := sorted(path for path in sizes if theirs is None and not _is_ours(path)):
            raise RunError(
                f"{self.url} holds what is no run's, such as {foreign[0]}: choose another URL, with nothing there"
            )
        self._there = dict.fromkeys(sizes, UNKNOWN)
        for record in () if theirs is None else (*theirs.files(), *theirs.pending):
            if sizes.get(record.path) == record.bytes and RunFolder.is_numbered_file(record.path):
                self._there[record.path] = record.sha256
        self._theirs, self._content, self._looked = theirs, found, True

    def _bring_file(self, record: FileRecord) -> None:
        """A file that a manifest names."""
        path = self.folder / record.path
        try:
            sums = Sums.of(path)
        except FileNotFoundError:
            raise Superseded(record.path) from None
        if sums.sha256 != record.sha256:
            raise Superseded(record.path)
        self._put(record.path, path, sums)
        if not self._keep:
            self._sums[record.path] = sums

    def _documents(self, record: FileRecord) -> bytes:
        """Those that a manifest counts: while a run goes on, the file or its twin has them, and soon neither."""
        for name in RunFolder.DOCUMENTS:
            with suppress(FileNotFoundError):
                content = (self.folder / name).read_bytes()
                if hashlib.sha256(content).hexdigest() == record.sha256:
                    return content
        raise Superseded(record.path)

    def _bring_beside(self) -> None:
        for path in BESIDE:
            if (self.folder / path).is_file():
                content = (self.folder / path).read_bytes()
                self._put(path, content, Sums.of(content))

    def _put(self, path: str, content: bytes | Path, sums: Sums) -> None:
        """Sends what is not there yet, and proves that it has arrived."""
        known = self._there.get(path)
        if known == sums.sha256:
            return
        if known is None or not self._target.holds(path, sums):
            self._there.pop(path, None)
            self._target.put(content, path)
            if not self._target.holds(path, sums):
                raise OSError(errno.EIO, f"{path} has arrived as something else", self.url)
            self.files += 1
            self.bytes += sums.n_bytes
        self._there[path] = sums.sha256


UNKNOWN = ""
"""In place of the SHA-256 of what is there."""


def _manifest_of(url: str) -> Manifest:
    """Where half of it has arrived, the one before it, its twin."""
    return Manifest.recover(RemotePath(url).listed())[0]


def _lost(url: str, folder: Path, manifest: Manifest, lost: list[Part]) -> str:
    if url != manifest.parts_at:
        return f"{url} cannot have all of {folder}: {told(manifest, lost)}; copy that there first"
    return (
        f"{url} has lost {lost[0].path}, which is nowhere else: `{resume_command(folder, url)}` captures its rows again"
    )


def _is_ours(path: str) -> bool:
    return RunFolder.is_numbered_file(path) or path in (*RunFolder.FILES, *BESIDE)


def _refuse_ahead(url: str, theirs: Manifest | None, ours: Manifest) -> None:
    if theirs is not None and theirs.rows > ours.rows:
        raise RunError(
            f"{url} has {theirs.rows:,} rows of this run, and the run itself {ours.rows:,}: what is there is ahead, "
            "and is left as it is; copy it back, or choose another URL"
        )


def note(folder: Path, url: str, content: bytes) -> None:
    """Writes down, in the run's folder, of which manifest the copy is, so that `state` tells it without a network."""
    told = {"url": url, "manifest": hashlib.sha256(content).hexdigest()}
    with suppress(CaptureError), durable_file(folder / RunFolder.MIRROR) as file:  # the copy is what it is
        file.write(json.dumps(told).encode())


def state(folder: Path, manifest: Manifest) -> str | None:
    """Where a run is mirrored, and whether all of it is there, as far as is known; None where it is not.

    Of a copy itself nothing is known.
    """
    if isinstance(folder, RemotePath):
        return None
    output = manifest.config.get("output")
    url = _noted(folder)[0] or (output.get("mirror") if isinstance(output, Mapping) else None)
    if not url:
        return None
    if has_all(folder, str(url)):
        return f"{url}, which has all of it"
    return f"{url}, which lags behind: {catch_up(folder, str(url))} catches up"


def has_all(folder: Path, url: str) -> bool:
    """Whether a run is at a URL as it is here, as far as was written down."""
    noted = _noted(folder)
    if noted[0] != require_url(url, ""):
        return False
    return noted[1] == hashlib.sha256((folder / RunFolder.MANIFEST).read_bytes()).hexdigest()


def _noted(folder: Path) -> tuple[str | None, str | None]:
    """URL and SHA-256 of the manifest there."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        noted: Any = read_json(folder / RunFolder.MIRROR, NOTE_BYTES)
        return str(noted["url"]), str(noted["manifest"])
    return None, None


NOTE_BYTES = 1 << 16


def resume_command(folder: Path, url: str) -> str:
    return shlex.join(["python", "-m", "sniffer.runs", "resume", str(folder), "--mirror", url])


def catch_up(folder: Path, url: str) -> str:
    """The command that does."""
    return f"`{shlex.join(['python', '-m', 'sniffer.runs', 'mirror', str(folder), url])}`"
