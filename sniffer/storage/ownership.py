"""Which folders are ours to write into, and that no link leads out of them.

A run begins in a folder that is new, is empty, or holds only what a run leaves that never got as far as a manifest. A
sweep does in one that has its index, or nothing but jobs. What else lies in a folder is someone's: it is refused before
anything is written, Hydra's own record included. Below a folder of ours nothing is written through a link: whoever
made the folder may have made the link, to have something of its reader's replaced.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sniffer.errors import RunError
from sniffer.storage.durable import final_name
from sniffer.storage.layout import RunFolder, SweepFolder
from sniffer.storage.untrusted import read_text

RERUN_HEAD = "# To run this again: python -m sniffer -cd THIS_FOLDER -cn rerun"
"""How every rerun.yaml begins."""

OUR_CALLBACKS = ("sniffer.sweep.callback.Watch", "sniffer.watch.Watch")
"""Named in what Hydra records of a run or a sweep of ours."""

NAMED, DEEP = 3, 4


def refuse_taken(folder: Path) -> None:
    """Raises RunError where a run cannot begin in a folder, since it holds something that is not a run's."""
    if found := strangers(folder):
        raise RunError(
            f"{folder} holds what is no run's ({_listed(found)}): choose a new or an empty folder, with hydra.run.dir "
            "or hydra.sweep.dir"
        )


def strangers(folder: Path) -> list[str]:
    """What lies in a folder and keeps a run from beginning there; nothing in a new one."""
    names = _names(folder)
    return [] if not _unknown(names, RunFolder.BEFORE) and _has_begun(folder, names) else names


def is_run(folder: Path) -> bool:
    """Whether a folder has a manifest, whole or not."""
    for name in RunFolder.MANIFESTS:
        with suppress(OSError):  # where it cannot be told, as in someone else's folder, there is nothing for us
            if (folder / name).is_file():
                return True
    return False


def never_began(folder: Path) -> bool:
    """Whether a run of ours was stopped here before it had a manifest, while its model was loading."""
    names = _names(folder)
    ours = [name for name in names if name in (*RunFolder.BEFORE, *RunFolder.RESULTS)]
    return RunFolder.CONFIG in names and not set(RunFolder.MANIFESTS) & set(names) and _has_begun(folder, ours)


def has_nothing_yet(folder: Path) -> bool:
    """Whether a run of ours was stopped here before it had a whole configuration to go on with."""
    names = _names(folder)
    return bool(names) and RunFolder.CONFIG not in names and not is_run(folder) and not strangers(folder)


def refuse_foreign_sweep(folder: Path) -> None:
    """Raises RunError where a sweep can neither begin nor go on, since the folder holds what is no sweep's."""
    for name in SweepFolder.FILES:
        refuse_links(folder, folder / name)
    found = [] if _is_ours(folder) else [name for name in _names(folder) if not _is_of_a_sweep(folder / name)]
    if found:
        raise RunError(
            f"{folder} holds what is no sweep's ({_listed(found)}): choose a new or an empty folder, "
            "with hydra.sweep.dir"
        )


def refuse_links(root: Path, path: Path) -> None:
    """Keeps what is written below a folder inside it.

    Raises:
        RunError: `path`, or a folder between it and `root`, is a link.
    """
    for place in [path, *path.parents][: len(path.relative_to(root).parts)]:
        if place.is_symlink():
            raise RunError(f"{place} is a link, and nothing is written through one: put a file or folder in its place")


def is_plain(path: Path) -> bool:
    """Whether a path names a file: no link, FIFO or device."""
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def _unknown(names: Iterable[str], known: Iterable[str]) -> set[str]:
    """The names that are not known, nor those of a run's file whose writer was killed."""
    return {name for name in names if final_name(name) not in (*RunFolder.BEFORE, *RunFolder.RECORDS)} - set(known)


def _has_begun(folder: Path, names: list[str]) -> bool:
    """Whether what lies here under a run's names is a run's: each file plain, and one of them that only we write."""
    if not all(is_plain(folder / name) for name in set(names).difference(RunFolder.FOLDERS)):
        return False
    present = {name for name in names if final_name(name) is None}
    if present & {RunFolder.CONFIG, RunFolder.RERUN}:
        return _text(folder / RunFolder.RERUN).startswith(RERUN_HEAD) and _is_record(folder / RunFolder.HYDRA)
    if RunFolder.HYDRA in present:
        return _is_record(folder / RunFolder.HYDRA) and _names_ours(folder / RunFolder.HYDRA_OWN)
    return not present or (present == {RunFolder.LOCK} and _is_lock(folder / RunFolder.LOCK))


def _is_lock(path: Path) -> bool:
    """Ours have no content."""
    return is_plain(path) and path.stat().st_size == 0


def _is_record(folder: Path) -> bool:
    """Whether a folder is what Hydra records of a job, if it is there at all."""
    return not folder.is_symlink() and all(
        name in RunFolder.HYDRA_RECORD and is_plain(folder / name) for name in _names(folder)
    )


def _is_ours(sweep: Path) -> bool:
    """Whether a sweep of ours was begun here, whatever has been put beside its jobs since."""
    return is_plain(sweep / SweepFolder.INDEX) or _names_ours(sweep / SweepFolder.MULTIRUN)


def _is_of_a_sweep(path: Path, depth: int = 0) -> bool:
    """Whether a path can lie in a sweep that has no index yet: its own files, jobs, folders of jobs."""
    if path.name == SweepFolder.MULTIRUN:
        return _names_ours(path)
    if not path.is_dir():
        return path.name in SweepFolder.FILES and is_plain(path) and (path.name != RunFolder.LOCK or _is_lock(path))
    if path.name in SweepFolder.FILES or is_run(path):
        return True
    if not strangers(path):
        return True
    return depth < DEEP and all(_is_of_a_sweep(below, depth + 1) for below in path.iterdir() if not below.is_symlink())


def _names(folder: Path) -> list[str]:
    """What a folder holds, in order; nothing where there is none."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{folder} cannot be read: {error.strerror}; check its permissions") from error


def _names_ours(path: Path) -> bool:
    text = _text(path)
    return any(callback in text for callback in OUR_CALLBACKS)


def _text(path: Path) -> str:
    with suppress(OSError, ValueError):
        return read_text(path)
    return ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
