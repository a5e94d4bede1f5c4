"""The runs of a comparison: opened, labelled, and put in an order."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sniffer import open_run
from sniffer.errors import ConfigError
from sniffer.reader.run import Run


@dataclass(frozen=True)
class Member:
    """A run of a comparison; `names` are all that a file of scores may call it."""

    run: Run
    label: str
    checkpoint: str
    revision: str | None
    names: frozenset[str]

    @property
    def deepest(self) -> int:
        """The number of the model's last attention layer, captured or not."""
        return max(layer.layer for layer in self.run.manifest.geometry)


def paths(text: str) -> list[str]:
    """runs=A or runs=[A,B]: paths as they are, whatever YAML would make of them.

    Raises:
        ConfigError: a list that is not closed, or names nothing.
    """
    text = text.strip()
    if text.startswith("[") != text.endswith("]"):
        raise ConfigError(f"runs={text} is no list: write runs=[outputs/A,outputs/B]")
    inner = text[1:-1] if text.startswith("[") else text
    found = [one.strip().strip("'\"") for one in (inner.split(",") if text.startswith("[") else [inner])]
    found = [one for one in found if one]
    if not found:
        raise ConfigError("runs= names nothing: write runs=outputs/SWEEP, or runs=[outputs/A,outputs/B]")
    return found


def members(given: Sequence[str]) -> list[Member]:
    """All runs that the paths lead to: run folders, sweeps, and other folders of runs; each once.

    Raises:
        RunError: a path leads to none, or one cannot be opened.
        ConfigError: fewer than two.
    """
    runs: dict[Path, tuple[Run, str, dict[str, str]]] = {}
    for path in given:
        opened = open_run(path)
        if isinstance(opened, Run):
            runs.setdefault(opened.folder, (opened, opened.folder.name, {}))
            continue
        for name, run in opened.runs.items():
            runs.setdefault(run.folder, (run, name, dict(opened.overrides[name])))
    if len(runs) < 2:
        which = f"{next(iter(runs))} is one" if runs else f"{', '.join(given)} has none"
        raise ConfigError(f"a comparison needs two runs or more, and {which}: give runs=[A,B], or a folder of several")
    found = list(runs.values())
    labels = _labels(found)
    return [_member(run, name, label) for (run, name, _), label in zip(found, labels, strict=True)]


def _member(run: Run, name: str, label: str) -> Member:
    checkpoint, revision = _model(run)
    short = _short(checkpoint)
    names = {label, name, run.folder.name, str(run.folder), checkpoint, short}
    if revision is not None:
        names |= {revision, f"{checkpoint}@{revision}", f"{short}@{revision}"}
    return Member(run, label, checkpoint, revision, frozenset(names))


def _model(run: Run) -> tuple[str, str | None]:
    model = run.manifest.model
    revision = model.get("revision")
    return str(model.get("checkpoint", "?")), None if revision is None else str(revision)


def _short(checkpoint: str) -> str:
    return checkpoint.rstrip("/").rpartition("/")[2] or checkpoint


def _labels(found: Sequence[tuple[Run, str, dict[str, str]]]) -> list[str]:
    """The first way of naming runs that tells all of them apart."""
    models = [_model(run) for run, _, _ in found]
    one_model = len({checkpoint for checkpoint, _ in models}) == 1
    revisions = [revision or "main" for _, revision in models]
    several = len(set(revisions)) > 1
    named = [f"{_short(one)}@{at}" if several else _short(one) for (one, _), at in zip(models, revisions, strict=True)]
    changed = {key for *_, own in found for key in own if len({other.get(key) for *_, other in found}) > 1}
    # pkg.key=value is told by its last word.
    swept = [
        ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in own.items() if key in changed)
        for *_, own in found
    ]
    folders = [run.folder for run, _, _ in found]
    above = len(os.path.commonprefix([folder.parent.parts for folder in folders]))
    ways = [revisions if one_model else named, named, swept, [folder.name for folder in folders]]
    told = [way for way in ways if len(set(way)) == len(way) and all(way)]
    return told[0] if told else ["/".join(folder.parts[above:]) for folder in folders]


@dataclass(frozen=True)
class Course:
    """Runs of one model's training, in its order. `x`: their places; `steps`: these are numbers of steps."""

    members: tuple[Member, ...]
    x: tuple[float, ...]
    steps: bool


def course(found: Sequence[Member]) -> Course | None:
    """The revisions of one training, where the runs are such: by their steps, as in step-4000 or step143000.

    Where a revision names none, or counting begins anew (lc-4k-to-32k-step-4000 after stage3-step-4720000), they keep
    the order in which they were given, evenly spaced.
    """
    revisions = [member.revision for member in found]
    if len({member.checkpoint for member in found}) > 1 or None in revisions or len(set(revisions)) < len(revisions):
        return None
    counted = [_steps(str(revision)) for revision in revisions]
    if all(one is not None for one in counted):
        order = sorted(range(len(found)), key=lambda place: counted[place][1])  # type: ignore[index]
        phases = [counted[place][0] for place in order]  # type: ignore[index]
        # Counting goes on from phase to phase if each phase is one stretch, in the order in which phases were given.
        stretches = [phase for place, phase in enumerate(phases) if place == 0 or phases[place - 1] != phase]
        given = list(dict.fromkeys(one[0] for one in counted if one is not None))
        if stretches == given and len({counted[place][1] for place in order}) == len(order):  # type: ignore[index]
            return Course(tuple(found[i] for i in order), tuple(counted[i][1] for i in order), True)  # type: ignore[index]
    return Course(tuple(found), tuple(map(float, range(len(found)))), False)


def _steps(revision: str) -> tuple[str, float] | None:
    """What comes before the number of steps, and that number; None where a revision names none."""
    found = re.search(r"step[-_]?(\d+(?:\.\d+)?)([kKmM]?)", revision)
    if found is None:
        return None
    return revision[: found.start()], float(found[1]) * {"": 1, "k": 1e3, "m": 1e6}[found[2].lower()]
