"""`runs resume RUN`: goes on where a run was stopped, by signal, error, kill or power cut, and mends what is damaged.

It goes through the same code as a fresh run, over the same batches, and skips those of which every row is
on disk. So the rows in the end are those of a run that was never stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sniffer.config.saving import save_plain
from sniffer.config.trust import Trust, build, needed_config
from sniffer.engine.model_cache import Load, load_anew
from sniffer.errors import RunError
from sniffer.process.environment import versions
from sniffer.process.threads import same_threads
from sniffer.runs.imports.told import refuse_imported
from sniffer.runs.mirror import brought
from sniffer.storage.integrity import leftovers, refuse_links
from sniffer.storage.layout import RunFolder
from sniffer.storage.lock import hold
from sniffer.storage.manifest import Manifest
from sniffer.storage.mirror import has_all
from sniffer.storage.on_disk import OnDisk, is_whole, look
from sniffer.storage.ownership import has_nothing_yet, is_run, never_began
from sniffer.storage.same_run import Earlier, as_plain, differences, refusal
from sniffer.storage.store import save
from sniffer.storage.there import find
from sniffer.storage.writer import Listing
from sniffer.types import described

log = logging.getLogger(__name__)


def resume(
    folder: Path,
    trust: Trust,
    *,
    force: bool = False,
    restore: bool = False,
    load: Load = load_anew,
) -> bool:
    """Completes a run, and its mirror if its URL was typed; False if there was nothing to do.

    Args:
        trust: what the saved configuration may do.
        force: go on although something that matters has changed.
        restore: put config.yaml back to what the run was made with.
        load: how to come by the model; jobs of a sweep hand it on.

    Raises:
        RunError: another process writes to the folder, a link leaves it, or something that matters has changed.
        SnifferError: as a fresh run.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder: give the folder that a run printed")
    refuse_links(folder)
    if not (begun := never_began(folder)):
        if has_nothing_yet(folder):
            raise RunError(
                f"{folder} is of a run that was stopped before it had written its configuration: run its command again"
            )
        # Says that it is no run's, before a lock is left in it.
        refuse_imported(folder, Manifest.recover(folder)[0], "resumed")
    with hold(folder):
        if begun and not is_run(folder):
            _run(folder, needed_config(folder), Earlier(), trust, None, load)
            return True
        manifest, wrong = Manifest.recover(folder)
        if wrong:
            log.warning("%s: its twin is whole and takes its place", wrong.split(";")[0])
        if restore:
            save_plain(folder, manifest.config)
        found, on_disk = look(folder, manifest, find(folder, manifest, trust.url))
        if manifest.status == "complete" and is_whole(folder, manifest, found):
            _mend(folder, manifest, on_disk)
            return trust.url is not None and _catch_up(folder, trust.url)
        plain = needed_config(folder)
        before = manifest.as_json()
        _refuse(differences(before, {"config": plain, "versions": versions()}), force)
        _run(
            folder,
            plain,
            Earlier(found, replace(on_disk, strict=not force), forced=force),
            trust,
            manifest.threads,
            load,
        )
    return True


def _run(
    folder: Path,
    plain: Mapping[str, Any],
    earlier: Earlier,
    trust: Trust,
    threads: int | None,
    load: Load,
) -> None:
    config = build(plain, trust, folder / RunFolder.CONFIG)
    if earlier.manifest is not None:
        # What can be told before the model loads; the rest is compared when it has.
        told = described(config.dataset, generates=config.generate is not None)
        now = {"seed": config.seed, "model": config.model.describe(), "dataset": told}
        _refuse(differences(earlier.manifest.as_json(), as_plain(now)), earlier.forced)

    from sniffer.capture import run

    with same_threads(threads):
        run(config, folder, earlier, load)


def _refuse(found: list[str], force: bool) -> None:
    if found and not force:
        raise refusal(found)


def _catch_up(folder: Path, url: str) -> bool:
    """Brings the mirror to what a complete run is; False where it is there already, as far as was written down."""
    if has_all(folder, url):
        return False
    log.info("%s", brought(folder, Manifest.load(folder, parts_must_exist=False), url))
    return True


def _mend(folder: Path, manifest: Manifest, on_disk: OnDisk) -> None:
    """Puts a complete run's small files in order, from their twins."""
    for path in leftovers(folder, manifest):
        (folder / path).unlink()
    listing = Listing.of(on_disk.committed.values())
    save(folder, replace(manifest, examples=listing.record), listing)
