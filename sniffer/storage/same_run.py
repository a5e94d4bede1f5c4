"""Taking up a stopped run, or extending a complete one: what is on disk, and whether it can go on as if it never ended.

It can if the same rows would come out: the same configuration, checkpoint, data, device and versions of what
computes. Whatever differs is named and refused, or, when forced, recorded in the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any

from sniffer.errors import RunError
from sniffer.storage.law import fields_of
from sniffer.storage.manifest import Manifest
from sniffer.storage.on_disk import OnDisk

MATTERS = (
    *("config", "seed", "model", "dataset", "sampler", "geometry", "selection", "device", "backbone", "versions"),
    "generation",
)
"""Parts of the manifest that rows depend on."""

UNKNOWN_EARLIER = (
    "config.model.architecture",
    "config.dataset.streaming",
    "dataset.streaming",
    "model.tokenizer",
    "dataset.files",
    "dataset.bytes",
    "dataset.sha256",
    "backbone.code",
    "backbone.packages",
    "backbone.lengths.apart_from",
    "backbone.sdpa_kernels",
    "device.capability",
    "device.cuda",
    "device.cudnn",
)
"""What early releases did not record, or not always: where one side lacks it, nothing is known to differ."""

VERSIONS = ("torch", "transformers", "tokenizers", "qk-sniffer")
"""Whose versions rows may depend on."""

LARGER = ("config.batch.breaks", "config.dataset.max_examples", "dataset.max_examples", "dataset.documents")
"""What an extended run has otherwise than before, if its data are what they were."""

GROWN = (*LARGER, "dataset.files", "dataset.bytes", "dataset.sha256", "dataset.commit", "dataset.unreadable")
"""And if they have grown."""

STOPPED_BY = {"running": "a kill", "complete": "damage", "interrupted": "an interruption"}
"""What stopped a run that cannot say so itself, by its status."""

SHOWN = 4
LONG = 60
"""Of differences that one line names, and of characters of each value."""


@dataclass(frozen=True)
class Earlier:
    """The stopped session of a run, or the complete one that is to be extended; without a manifest there is none.

    `forced`: differences are recorded instead of refused. `extended`: the configuration of an extended run.
    """

    manifest: Manifest | None = None
    on_disk: OnDisk = field(default_factory=OnDisk)
    forced: bool = False
    extended: Mapping[str, Any] | None = None

    @property
    def bytes(self) -> int:
        """On disk already."""
        if self.manifest is None:
            return 0
        return sum(part.bytes for part in (*self.manifest.parts, *self.manifest.pending))

    def continued(self, fresh: Manifest) -> Manifest:
        """The manifest to go on with, given the one that a fresh run would start with.

        Raises:
            RunError: naming what differs.
        """
        if self.manifest is None:
            return fresh
        if self.extended is not None:
            return self._grown(self.manifest, replace(fresh, config=as_plain(self.extended)))
        found = differences(self.manifest.as_json(), fresh.as_json())
        if found and not self.forced:
            raise refusal(found)
        resume = {
            "at": fresh.created,
            "stopped_by": self.manifest.reason or STOPPED_BY[self.manifest.status],
            "examples": len(self.on_disk.committed),
            "differences": found,
        }
        resumes = (*self.manifest.resumes, resume)
        rope = self.manifest.rope or fresh.rope
        begun = replace(self.manifest, status="running", reason=None, finished=None, parts_at=fresh.parts_at)
        return replace(begun, rope=rope, resumes=resumes)

    def _grown(self, then: Manifest, fresh: Manifest) -> Manifest:
        refuse_other(differences(then.as_json(), fresh.as_json(), GROWN))
        noted = {"at": fresh.created, "extended": True, "examples": len(self.on_disk.committed)}
        resumes, dataset = (*then.resumes, noted), as_plain(fresh.dataset)
        begun = replace(then, status="running", finished=None, parts_at=fresh.parts_at)
        return replace(begun, resumes=resumes, dataset=dataset, config=fresh.config)


def differences(then: Mapping[str, Any], now: Mapping[str, Any], apart_from: Sequence[str] = ()) -> list[str]:
    """What rows may depend on and is not as it was, one line each.

    Args:
        then: a manifest as JSON.
        now: the same, or only some of its keys, which alone are compared.
        apart_from: names that are not.
    """
    lines = []
    for key in (key for key in MATTERS if then.get(key) and key in now):
        before, after = (dict(_flat(key, _that_matters(key, values[key]))) for values in (then, now))
        unknown = [name for name in UNKNOWN_EARLIER if not (_has(before, name) and _has(after, name))]
        unknown += apart_from
        for name in dict.fromkeys([*before, *after]):
            if not _within(name, unknown) and not _equal(before.get(name), after.get(name)):
                first, second = _shown(before, after, name), _shown(after, before, name)
                lines.append(f"{name}: {first} then, {second} now")
    return lines


def as_plain(values: Any) -> Any:
    """Values as they come back from a manifest."""
    return json.loads(json.dumps(values, default=str))


def refusal(found: list[str]) -> RunError:
    return RunError(
        f"the run cannot go on as it began: {_named(found)}; put it back as it was, "
        "or --force to go on all the same, which the manifest will record (--restore puts config.yaml back)"
    )


def refuse_other(found: list[str]) -> None:
    """Raises RunError where a run that is to be extended was made with something else."""
    if found:
        raise RunError(
            f"the run cannot be extended: {_named(found)}; put it back as it was, or capture into a new folder"
        )


def _named(found: list[str]) -> str:
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{'; '.join(found[:SHOWN])}{more}"


def _has(values: Mapping[str, Any], section: str) -> bool:
    """Whether something is known of a section; null says that nothing is."""
    return any(_within(name, [section]) and value is not None for name, value in values.items())


def _within(name: str, sections: Iterable[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _equal(one: Any, other: Any) -> bool:
    """Early releases knew a large file by the beginning of what is known of it now: they agree as far as it tells."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    short, long = sorted((one, other), key=len)
    return "first MiB" in short and long.startswith(f"{short}, sha256:")


def _that_matters(key: str, values: Any) -> Any:
    if key == "model":
        return _as_early(values)
    if key == "versions":
        return {name: values[name] for name in VERSIONS if name in values}
    if key == "sampler":
        return fields_of(values)
    if key == "device":
        return {name: value for name, value in values.items() if name not in ("memory", "driver")}
    if key == "config":
        return {name: value for name, value in values.items() if name not in ("output", "engine")}
    return values


def _as_early(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of a model, without what early releases knew and did not record."""
    known = {name: value for name, value in model.items() if (name, value) != ("geometry", "default")}
    tokenizer = known.get("tokenizer")
    if isinstance(tokenizer, Mapping) and tokenizer.get("stand_in"):
        known["tokenizer"] = {name: value for name, value in tokenizer.items() if name not in ("source", "stand_in")}
    return known


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A nested value's leaves by dotted name."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value


def _shown(values: Mapping[str, Any], beside: Mapping[str, Any], name: str) -> str:
    """A value as a short text, from where it begins to differ from the one beside it, should that be far behind."""
    text, other = (str(one[name]) if name in one else "absent" for one in (values, beside))
    same = len(commonprefix([text, other]))
    text = f"...{text[same:]}" if same > LONG // 2 else text
    return text if len(text) <= LONG else f"{text[: LONG - 3]}..."
