"""Which key was meant: the nearest of those that exist, for whoever mistyped one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sniffer.storage.untrusted import read_yaml
from sniffer.words import NO_KEY

NEAR = 0.75
"""As difflib counts: 1 for the same, 0 for nothing in common."""

PARTS = {"sampler": ("q", "k"), "dataset": ("hay",)}
"""Of sampler=per_side and dataset=niah: each has the keys of its group."""

UNKNOWN = re.compile(re.escape(NO_KEY).replace(r"\{\}", r"(\S+?)"))


def with_meant(said: str, conf: Path) -> str:
    """An error about a key that does not exist, with the one that was meant; any other as it is.

    Args:
        conf: the folder of our configuration.
    """
    found = UNKNOWN.search(said)
    if found is None:
        return said
    known = {*keys(conf)}
    last = {one.rpartition(".")[2]: one for one in sorted(known)}
    if found[1] in known:
        return said.replace(f"key {found[1]}:", f"key {found[1]} here, where another choice of its group has it:", 1)
    near = get_close_matches(found[1], known, 1, NEAR)
    # layers=3 instead of capture.layers=3
    near = near or [last[one] for one in get_close_matches(found[1].rpartition(".")[2], last, 1, NEAR)]
    return said.replace(f"key {found[1]}:", f"key {found[1]}, did you mean {near[0]}?", 1) if near else said


def keys(conf: Path) -> Iterator[str]:
    """All keys that our files set: those at the top as they are, those of a group behind its name."""
    for path in conf.rglob("*.yaml"):
        group = "" if path.parent == conf else path.parent.relative_to(conf).as_posix()
        if group in ("", "sampler", "dataset", "model", "engine", "generate"):
            values = read_yaml(path)
            yield from _flat(values, group)
            for part in PARTS.get(group, ()):
                yield from _flat(values, f"{group}.{part}")


def _flat(values: Any, before: str) -> Iterator[str]:
    if not isinstance(values, Mapping):
        return
    for name, value in values.items():
        # A checkpoint's own numbers are set by model.config_overrides.
        if name in ("defaults", "hydra", "architecture") or str(name).startswith("_"):
            continue
        key = f"{before}.{name}".strip(".")
        yield key
        yield from _flat(value, key)
