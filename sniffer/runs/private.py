"""What a published run does not tell: where things lie on the publisher's machine, and in its network.

A path is cut down to its last part, wherever it stands. What was written for the publisher alone, why a session stopped
and what was different in the next one, is cut down to what is known to name no place: an error's class, a key's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from sniffer.errors import RunError
from sniffer.storage.manifest import Manifest

URL = r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s/@]*@)?(?P<rest>[^\s'\",;)\]}>]*)"
PATH = r"(?<![\w/.~-])(?:~[\w-]*/|/|[A-Za-z]:[\\/])[^\s'\",;:)\]}>]+"
PLACE = re.compile(f"{URL}|{PATH}")

SHORTEST = 4
"""Characters of a path that is worth looking for."""


def public(manifest: Manifest, *, tokens: bool = False) -> Manifest:
    """The manifest of a run as it may be read by anyone; without `tokens`, from which its texts follow, if not told."""
    config = dict(without_paths(manifest.config))
    if not tokens and isinstance(config.get("output"), Mapping) and config["output"].get("tokens"):
        config["output"] = {**config["output"], "tokens": False}
    if isinstance(config.get("engine"), Mapping):
        config["engine"] = {**config["engine"], **{key: None for key in config["engine"] if key == "address"}}
    free = ("model", "dataset", "sampler", "versions", "device", "backbone")
    return replace(
        manifest,
        reason=None,
        tokens=manifest.tokens if tokens else (),
        config=config,
        parts_at=None,
        resumes=tuple(_without_words(resume) for resume in manifest.resumes),
        **{name: without_paths(getattr(manifest, name)) for name in free},
    )


def without_paths(value: Any) -> Any:
    """The same value, with absolute paths cut down to their last part."""
    if isinstance(value, Mapping):
        return {without_paths(name): without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    # A whole value may have blanks in it, which end a path elsewhere.
    whole = value.startswith(("/", "~")) or PureWindowsPath(value).drive
    return _last(value) if whole else PLACE.sub(_shortened, value)


def _shortened(found: re.Match[str]) -> str:
    # A query may be a signature, by which anyone could read what is private.
    if not found["scheme"]:
        return _last(found[0])
    return _last(found["rest"]) if found["scheme"] == "file://" else found["scheme"] + found["rest"].partition("?")[0]


def _last(path: str) -> str:
    return PureWindowsPath(path).name


def _without_words(resume: Mapping[str, Any]) -> dict[str, Any]:
    """A resume without what its messages say: the class of the error that stopped it, the keys that differed."""
    told = {name: resume[name] for name in ("at", "examples", "extended") if name in resume}
    names = [str(line).partition(": ")[0] for line in resume.get("differences", ())]
    if told.get("extended") is True:
        return told
    stopped_by = str(resume.get("stopped_by", "")).partition(":")[0]
    return {**told, "stopped_by": without_paths(stopped_by), "differences": without_paths(names)}


def refuse_private(folder: Path, names: Iterable[str], run: Path, manifest: Manifest) -> None:
    """Reads again what would be published, for paths of this machine that are known.

    Args:
        folder: where it lies, under `names`.
        run: the folder of the run, and `manifest` its own.

    Raises:
        RunError: one is there.
    """
    known = {str(place) for place in (Path.home(), Path.cwd(), run.parent, *_folders(manifest.as_json()))}
    for name in names:
        text = (folder / name).read_text(encoding="utf-8")
        for path in sorted(place for place in known if len(place) >= SHORTEST):
            if re.search(rf"(?<!\w){re.escape(path)}(?!\w)", text):
                raise RunError(
                    f"{name} would tell the local path {path}: publish a copy of the run without it in config.yaml "
                    "and manifest.json, and please report this"
                )


def _folders(value: Any) -> Iterator[Path]:
    """The folders of all paths that are values of their own."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _folders(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _folders(inner)
    elif isinstance(value, str) and value.startswith("/"):
        yield Path(value).parent
