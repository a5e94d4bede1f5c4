"""Which modelling files a run was made with, as far as they are not those of transformers as it was published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sniffer.config.build import TRUSTED, build
from sniffer.config.resolve import ROLES
from sniffer.errors import RunError, SnifferError
from sniffer.storage.manifest import Manifest
from sniffer.storage.same_run import differences

COPY = "local copy, "

MADE_OF = ("model", "dataset", "device", "backbone", "versions")
"""Parts of a manifest that no key of the configuration tells in full."""


def code_of(manifest: Manifest) -> dict[str, str]:
    """The digest of each modelling file by the name of its module; nothing from early releases."""
    code = manifest.backbone.get("code")
    return {str(name): str(told) for name, told in code.items()} if isinstance(code, Mapping) else {}


def changed_code(manifest: Manifest, model: Any) -> list[str]:
    """Which modelling files are not, here and now, what the run was made with.

    Args:
        model: the checkpoint of the run's configuration.
    """
    then, sources = code_of(manifest), getattr(model, "sources", None)
    now: Mapping[str, str] = sources(then) if sources is not None else {}
    return [f"{name}: {then[name]} then, {told} now" for name, told in now.items() if told != then[name]]


def told_copies(manifest: Manifest, trusted: Sequence[str] = ()) -> Iterator[str]:
    """Names each hand-edited copy that a run was made with, and whether it is the one that is here."""
    copies = {name: told for name, told in code_of(manifest).items() if told.startswith(COPY)}
    try:
        model = build(manifest.config.get("model"), "model", (*TRUSTED, *trusted), ROLES["model"]) if copies else None
    except SnifferError:
        model = None
    sources = getattr(model, "sources", None)
    for name, told in copies.items():
        here = sources([name]).get(name, "") if sources is not None else ""
        state = "here too" if here == told else "here is another one" if here.startswith(COPY) else "not here"
        yield f"made with a hand-edited copy of {name} ({told.removeprefix(COPY)}), {state}"


def made_of_other(first: Path, second: Path) -> list[str]:
    """What a run that is run again was made of, and is not any more; nothing where the first is no run folder."""
    try:
        then, now = (Manifest.load(folder, parts_must_exist=False).as_json() for folder in (first, second))
    except RunError:
        return []
    return differences({key: then[key] for key in MADE_OF}, now)
