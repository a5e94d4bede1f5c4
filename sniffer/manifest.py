"""manifest.json: what a run is, and which of its files count.

A part that the manifest does not name is a leftover, whatever it holds; so writing the manifest is the
moment at which captured rows are kept. It is replaced as a whole and can be read while the run goes
on. What follows from the parts (rows per kind and bucket, digests) is written out for the person who
opens the file, and worked out again when it is read.

The file ends with a checksum over itself, and has a twin, `.manifest.json`, written after it: where one of
the two is damaged, `recover` finds the other.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sniffer.bounds import implausible
from sniffer.digest import combine
from sniffer.durable import durable_file
from sniffer.environment import commit, now, versions
from sniffer.errors import CaptureError, RunError
from sniffer.finite import NotFinite
from sniffer.schema import PART_NUMBER, SCHEMA_VERSION, FileRecord, Part
from sniffer.types import KINDS, LayerGeometry
from sniffer.untrusted import MANIFEST_BYTES, read_json
from sniffer.wellformed import misfits

MANIFEST_PATH = "manifest.json"
TWIN_PATH = ".manifest.json"
CHECKSUM = "checksum"
STATUSES = ("running", "complete", "interrupted")

INSIDE_INFERENCE = ("sample", "forward", "capture")
"""Stages that happen within the inference; capture is a part of forward."""


@dataclass(frozen=True)
class Manifest:
    """All that is known of a run beside its rows.

    Attributes:
        status: running, complete or interrupted; `reason` says why it was interrupted.
        created, finished: UTC, as ISO 8601.
        versions: of Python and of the packages that matter; `commit` is this project's, where it runs
            from a checkout.
        threads, device: what float sums may depend on.
        backbone: what was found when the model was loaded: attention implementation, skipped layers, layers
            that share another's keys.
        model, dataset: what the checkpoint and the dataset say of themselves.
        geometry: every attention layer of the model, captured or not.
        selection: layer -> kind -> the captured heads.
        sampler: class and fields, and `probability_by_bucket`, the keep probability of each bucket.
        counts: of documents and tokens: examples, skipped_empty, truncated, tokens.
        timings: seconds per stage.
        config: the resolved configuration, as in config.yaml.
        parts, examples: the files that count. All parts together hold the same documents for every
            (layer, kind), those of `examples`.
        pending: parts of documents that other (layer, kind) pairs do not have on disk yet. They are not
            part of the run, but a resumed run need not capture them again.
        resumes: when the run was taken up again, what had stopped it, and what was different by then.
    """

    status: str
    seed: int
    model: Mapping[str, Any]
    dataset: Mapping[str, Any]
    sampler: Mapping[str, Any]
    geometry: tuple[LayerGeometry, ...]
    selection: Mapping[int, Mapping[str, tuple[int, ...]]]
    reason: str | None = None
    created: str = field(default_factory=now)
    finished: str | None = None
    versions: Mapping[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=commit)
    threads: int | None = None
    device: Mapping[str, Any] = field(default_factory=dict)
    backbone: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    pending: tuple[Part, ...] = ()
    examples: FileRecord | None = None
    resumes: tuple[Mapping[str, Any], ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        """Of all parts on disk."""
        return sum(part.bytes for part in self.parts)

    @property
    def rows_by_kind(self) -> dict[str, int]:
        rows: Counter[str] = Counter()
        for part in self.parts:
            rows[part.kind] += part.rows
        return dict(rows)

    @property
    def rows_by_bucket(self) -> dict[int, int]:
        rows: Counter[int] = Counter()
        for part in self.parts:
            rows.update(part.buckets)
        return dict(sorted(rows.items()))

    @property
    def not_finite(self) -> dict[int, dict[str, NotFinite]]:
        """Rows with a NaN or an infinity, of each layer and kind that has any, as far as its parts say."""
        found: dict[int, dict[str, NotFinite]] = {}
        for part in self.parts:
            if part.not_finite:
                kinds = found.setdefault(part.layer, {})
                kinds[part.kind] = kinds.get(part.kind, NotFinite()) + part.not_finite
        return {layer: dict(sorted(found[layer].items())) for layer in sorted(found)}

    @property
    def counts_not_finite(self) -> bool:
        """Whether all parts say how many rows hold a NaN or an infinity; those of early releases do not."""
        return all(part.not_finite is not None for part in self.parts)

    @property
    def digest(self) -> str:
        """Of all rows: equal for two runs that captured the same, however split into parts."""
        return combine(part.digest for part in self.parts)

    @property
    def digests(self) -> dict[int, dict[str, str]]:
        """Of the rows of each layer and kind."""
        found: dict[tuple[int, str], list[str]] = defaultdict(list)
        for part in self.parts:
            found[part.layer, part.kind].append(part.digest)
        return {layer: {kind: combine(found[layer, kind]) for kind in kinds} for layer, kinds in self.selection.items()}

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(seconds for stage, seconds in self.timings.items() if stage not in INSIDE_INFERENCE)

    def parts_of(self, layer: int, kind: str) -> list[Part]:
        return [part for part in self.parts if (part.layer, part.kind) == (layer, kind)]

    def layer(self, number: int) -> LayerGeometry:
        """The geometry of one layer; KeyError if the model has none of that number."""
        return {layer.layer: layer for layer in self.geometry}[number]

    def save(self, folder: Path) -> None:
        """Writes manifest.json, durably: from here on its parts count.

        Raises:
            CaptureError: the disk is full or cannot be written to. The previous manifest stands in at least one of
                the two files, or this one does in the first.
        """
        values = self.as_json()
        text = json.dumps(values | {CHECKSUM: _checksum(values)}, indent=2, ensure_ascii=False).encode()
        if len(text) >= MANIFEST_BYTES:
            raise CaptureError(
                f"the manifest of {len(self.parts) + len(self.pending):,} parts is too large to be read again: raise "
                "output.checkpoint_every or output.memory_limit"
            )
        for path in (MANIFEST_PATH, TWIN_PATH):
            with durable_file(folder / path) as file:
                file.write(text + b"\n")

    @classmethod
    def load(cls, folder: Path, *, parts_must_exist: bool = True, path: str = MANIFEST_PATH) -> Manifest:
        """Reads and checks manifest.json; keys it does not know are left out.

        Raises:
            RunError: not a run folder, a broken manifest, a newer schema, a path that leaves the folder,
                or (unless told otherwise) a missing part.
        """
        values = _read(folder, path)
        version = values.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise _broken(folder, f"its schema_version is {version!r}, not a number from 1")
        if version > SCHEMA_VERSION:
            raise RunError(
                f"{folder} was written with schema version {version}, and this release reads up to "
                f"{SCHEMA_VERSION}: install a newer qk-sniffer"
            )
        try:
            _check_sum(values)
            manifest = _from_json(values)
        except KeyError as error:
            raise _broken(folder, f"it lacks {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise _broken(folder, " ".join(str(error).split())) from error
        for record in (*manifest.files(), *manifest.pending):
            _check_path(folder, record.path)
            if isinstance(record, Part) and not PART_NUMBER.search(record.path):
                raise _broken(folder, f"it names {record.path!r}, which is no name of a part")
        for record in manifest.files() if parts_must_exist else ():
            if not (folder / record.path).is_file():
                raise RunError(
                    f"{folder} lacks {record.path}, which its manifest names: restore it, or "
                    f"`python -m sniffer.runs resume {folder}` to capture its rows again"
                )
        return manifest

    @classmethod
    def recover(cls, folder: Path) -> tuple[Manifest, str | None]:
        """The manifest, or its twin where the manifest is damaged; and what was wrong with it, if anything.

        Raises:
            RunError: as `load`; neither can be read.
        """
        try:
            return cls.load(folder, parts_must_exist=False), None
        except RunError as error:
            try:
                return cls.load(folder, parts_must_exist=False, path=TWIN_PATH), str(error)
            except RunError:
                raise error from None

    def files(self) -> list[FileRecord]:
        """Every file that counts, examples.parquet included."""
        return [*([self.examples] if self.examples else []), *self.parts]

    def as_json(self) -> dict[str, Any]:
        """As plain values of the kinds that JSON has."""
        values = asdict(self)
        parts, pending, examples = values.pop("parts"), values.pop("pending"), values.pop("examples")
        values["rows"] = {
            "total": self.rows,
            "by_kind": self.rows_by_kind,
            "by_bucket": self.rows_by_bucket,
            "not_finite": _plain(self.not_finite) if self.counts_not_finite else None,
        }
        values["digest"] = self.digest
        values["digests"] = self.digests
        ordered = {
            "schema_version": self.schema_version,
            **values,
            "examples": examples,
            "pending": pending,
            "parts": parts,
        }
        # A value that JSON does not know is written as text: better than to lose a night's rows over it.
        plain: dict[str, Any] = json.loads(json.dumps(ordered, ensure_ascii=False, default=str))
        return plain


def _plain(not_finite: Mapping[int, Mapping[str, NotFinite]]) -> dict[int, dict[str, dict[str, int]]]:
    return {layer: {kind: asdict(found) for kind, found in kinds.items()} for layer, kinds in not_finite.items()}


def _checksum(values: Mapping[str, Any]) -> str:
    """Of values read from JSON or about to be written, whatever their layout in the file."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _check_sum(values: dict[str, Any]) -> None:
    """Manifests of early releases have no checksum."""
    found = values.pop(CHECKSUM, None)
    if found is not None and found != _checksum(values):
        raise ValueError("its content does not match its checksum")


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            f"{folder} is not a run folder: it has no {MANIFEST_PATH}; give the folder that a run printed"
        ) from None
    except OSError as error:
        raise RunError(f"could not read {path}: {error.strerror}; check its permissions") from error
    except ValueError as error:
        raise _broken(folder, f"it cannot be read as JSON ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise _broken(folder, "it is not a JSON object")
    return values


def _from_json(values: Mapping[str, Any]) -> Manifest:
    names = [name for name in Manifest.__dataclass_fields__ if name in values]
    plain = {name: values[name] for name in names}
    if values["status"] not in STATUSES:
        raise ValueError(f"its status is {values['status']!r}, not one of {', '.join(STATUSES)}")
    manifest = Manifest(
        **plain
        | {
            "geometry": tuple(_record(LayerGeometry, layer) for layer in values["geometry"]),
            "selection": {
                layer: {kind: tuple(heads) for kind, heads in kinds.items()}
                for layer, kinds in _numbered(values["selection"]).items()
            },
            "sampler": _sampler(values["sampler"]),
            "parts": tuple(_part(part) for part in values["parts"]),
            "pending": tuple(_part(part) for part in values.get("pending", ())),
            "resumes": tuple(values.get("resumes", ())),
            "examples": _record(FileRecord, values["examples"]) if values["examples"] else None,
        }
    )
    _require_sense(manifest)
    return manifest


def _require_sense(manifest: Manifest) -> None:
    """Whoever reads a manifest may come to rely on what is checked here.

    Raises:
        ValueError: a value is of another type than its annotation, or names what is not there.
    """
    for wrong in misfits(manifest, Manifest, ""):
        raise ValueError(wrong)
    loose: tuple[tuple[str, Any, Any], ...] = (
        ("sampler.probability_by_bucket", manifest.sampler.get("probability_by_bucket", {}), Mapping[int, float]),
        ("sampler.seed_by", manifest.sampler.get("seed_by", []), list),
        ("dataset.shard", manifest.dataset.get("shard", {}), Mapping[str, int]),
        *((f"resumes[{n}].differences", one.get("differences", []), list) for n, one in enumerate(manifest.resumes)),
    )
    for name, value, hint in loose:
        for wrong in misfits(value, hint, name):
            raise ValueError(wrong)
    datetime.fromisoformat(manifest.created)
    shaped = {
        (layer.layer, kind)
        for layer in manifest.geometry
        for kind in layer.heads.keys() & layer.dims.keys() & set(KINDS)
        if layer.dims[kind] > 0
    }
    for number, captured in manifest.selection.items():
        for kind in captured:
            if (number, kind) not in shaped:
                raise ValueError(f"it selects kind {kind!r} of layer {number}, of which it gives no shape")
    for part in (*manifest.parts, *manifest.pending):
        if part.kind not in manifest.selection.get(part.layer, {}):
            raise ValueError(f"it names a part of kind {part.kind!r} of layer {part.layer}, which it does not select")
    for wrong in implausible(manifest):
        raise ValueError(wrong)


def _part(values: Mapping[str, Any]) -> Part:
    return _record(Part, {**values, "buckets": _numbered(values["buckets"])})


def _sampler(values: Mapping[str, Any]) -> dict[str, Any]:
    law = "probability_by_bucket"
    return {**values, law: _numbered(values[law])} if law in values else dict(values)


def _numbered(values: Mapping[str, Any]) -> dict[int, Any]:
    """JSON has no integer keys."""
    return {int(number): value for number, value in values.items()}


def _record(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A dataclass from its JSON object, without keys that a later release added; early ones lack some."""
    wanted = [f.name for f in fields(kind) if f.name in values or f.default is MISSING]
    return kind(**{name: values[name] for name in wanted})


def _check_path(folder: Path, path: str) -> None:
    """Refuses a path that could name anything outside the run folder, on any system."""
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    leaves = posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts
    if leaves or not path:
        raise RunError(
            f"{folder / MANIFEST_PATH} names {path!r}, which is outside the run folder: get the run again "
            "from a source you trust"
        )


def _broken(folder: Path, what: str) -> RunError:
    return RunError(
        f"{folder / MANIFEST_PATH} is broken: {what}; restore the file, or "
        f"`python -m sniffer.runs resume {folder}`, which does if it can"
    )
