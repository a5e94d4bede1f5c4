"""manifest.json: what a run is, and which of its files count.

A part that the manifest does not name is a leftover, whatever it holds; so writing the manifest is the
moment at which captured rows are kept. It is replaced as a whole and can be read while the run goes
on. What follows from the parts (rows per kind and bucket, digests) is written out for the person who
opens the file, and worked out again when it is read.

The file ends with a checksum over itself, and has a twin, `.manifest.json`, written after it: where one of
the two is damaged, `recover` finds the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sniffer.errors import CaptureError, RunError, unbroken
from sniffer.process.environment import commit, now, versions
from sniffer.storage.away import require_files
from sniffer.storage.bounds import require_sense
from sniffer.storage.counted import Counted
from sniffer.storage.durable import durable_file
from sniffer.storage.law import fields_of, from_json, kept_whole, law_of_kind
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest_file import (
    CHECKSUM,
    broken,
    check_path,
    checksum_of,
    numbered,
    numbers,
    part_from,
    read_manifest,
    record_from,
    take_checksum,
)
from sniffer.storage.schema import SCHEMA_VERSION, FileRecord, Part
from sniffer.storage.untrusted import MANIFEST_BYTES
from sniffer.types import KIND, AttentionLayout, Column, Difference, LayerGeometry, MomentsLayout, by_number, columns_of

STATUSES = ("running", "complete", "interrupted")

INSIDE_INFERENCE = ("prefill", "decode", "sample", "forward", "capture")
"""Stages that happen within the inference; capture is a part of forward."""


@dataclass(frozen=True)
class Manifest(Counted):
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
        sampler: class and fields, and `probability_by_bucket`, the keep probability of each bucket (law.py).
        counts: of documents and tokens: examples, skipped_empty, truncated, tokens.
        timings: seconds per stage.
        config: the resolved configuration, as in config.yaml.
        parts, examples: the files that count. All parts together hold the same documents for every
            (layer, kind), those of `examples`.
        pending: parts of documents that other (layer, kind) pairs do not have on disk yet. They are not
            part of the run, but a resumed run need not capture them again.
        tokens: files with the token ids of the documents (tokens.py); none where they are not kept.
        moments: which sums over all positions the run has (sniffer.types.MomentsLayout); None for none. moment_files:
            where they are (moments.py).
        attention: which columns statistics of attention have (sniffer.types.AttentionLayout); None for none.
        scores: what logits are made of beside scaling * q.k, by layer (sniffer.types.ScoreFacts); empty in early runs.
        rope: how layers turn q and k by position (sniffer.types.Rope), an entry for all `layers` that have the same;
            empty in early runs.
        model_config: the file with the model's resolved config; None in early runs.
        generation: how a model went on with the documents, and which tokens ended that; None where it did not.
        differences: by layer and kind, how far what was captured live is from one forward over the whole document
            (sniffer.types.Difference), where the run has looked; empty elsewhere.
        parts_at: the URL that has those parts which are not in the folder (away.py); None where all of them are.
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
    tokens: tuple[FileRecord, ...] = ()
    moment_files: tuple[FileRecord, ...] = ()
    moments: Mapping[str, Any] | None = None
    attention: Mapping[str, Any] | None = None
    scores: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    rope: tuple[Mapping[str, Any], ...] = ()
    model_config: FileRecord | None = None
    generation: Mapping[str, Any] | None = None
    differences: Mapping[int, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    parts_at: str | None = None
    resumes: tuple[Mapping[str, Any], ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(seconds for stage, seconds in self.timings.items() if stage not in INSIDE_INFERENCE)

    def probability_by_bucket(self, kind: str) -> Mapping[int, float]:
        """With which the sampler kept a position of a kind, by bucket; empty where an early release did not say."""
        return law_of_kind(self.sampler, kind)

    def kept_sections(self, kind: str) -> list[str]:
        """Sections of which the sampler kept every position of a kind."""
        return kept_whole(self.sampler, KIND[kind].draw)

    @property
    def sampler_fields(self) -> dict[str, Any]:
        """The sampler's class and fields, as a configuration has them."""
        return fields_of(self.sampler)

    @property
    def layout(self) -> AttentionLayout | None:
        """Of the columns of statistics of attention, where the run has them."""
        return None if self.attention is None else AttentionLayout.from_json(self.attention)

    @property
    def moments_layout(self) -> MomentsLayout | None:
        """Of its moments, where the run has them."""
        return None if self.moments is None else MomentsLayout.from_json(self.moments)

    def columns(self, layer: int, kind: str) -> tuple[Column, ...]:
        """The columns of a kind's values at one layer."""
        return columns_of(self.layer(layer), kind, self.layout)

    def apart_by(self, found: Mapping[tuple[int, str], Difference]) -> Manifest:
        """This one, with differences of more documents."""
        told: dict[int, dict[str, Any]] = {layer: dict(kinds) for layer, kinds in self.differences.items()}
        for (layer, kind), new in found.items():
            of_layer = told.setdefault(layer, {})
            of_layer[kind] = asdict(Difference(**of_layer.get(kind, {})) + new)
        return replace(self, differences={layer: told[layer] for layer in sorted(told)}) if found else self

    def parts_of(self, layer: int, kind: str) -> list[Part]:
        return [part for part in self.parts if (part.layer, part.kind) == (layer, kind)]

    def layer(self, number: int) -> LayerGeometry:
        """The geometry of one layer; KeyError if the model has none of that number."""
        return by_number(self.geometry)[number]

    def save(self, folder: Path) -> None:
        """Writes manifest.json, durably: from here on its parts count.

        Raises:
            CaptureError: the disk is full or cannot be written to. The previous manifest stands in at least one of
                the two files, or this one does in the first.
        """
        text = self.content()
        if len(text) > MANIFEST_BYTES:
            raise CaptureError(
                f"the manifest of {len(self.parts) + len(self.pending):,} parts is too large to be read again: raise "
                "output.checkpoint_every or output.memory_limit"
            )
        for path in RunFolder.MANIFESTS:
            with durable_file(folder / path) as file:
                file.write(text)

    def content(self) -> bytes:
        """Of the file."""
        values = self.as_json()
        text = json.dumps(values | {CHECKSUM: checksum_of(values)}, indent=2, ensure_ascii=False)
        return f"{text}\n".encode()

    @classmethod
    def load(cls, folder: Path, *, parts_must_exist: bool = True, path: str = RunFolder.MANIFEST) -> Manifest:
        """Reads and checks manifest.json; keys it does not know are left out.

        Raises:
            RunError: not a run folder, a broken manifest, a newer schema, a path that leaves the folder,
                or (unless told otherwise) a part that is missing, or at a URL alone.
        """
        values = read_manifest(folder, path)
        version = values.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise broken(folder, f"its schema_version is {version!r}, not a number from 1")
        if version > SCHEMA_VERSION:
            raise RunError(
                f"{folder} was written with schema version {version}, and this release reads up to "
                f"{SCHEMA_VERSION}: install a newer qk-sniffer"
            )
        try:
            take_checksum(values)
            manifest = _from_json(values)
        except KeyError as error:
            raise broken(folder, f"it lacks {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise broken(folder, unbroken(error)) from error
        for record in (*manifest.files(), *manifest.pending):
            check_path(folder, record.path)
            if record is not manifest.examples and not RunFolder.is_numbered(record.path):
                raise broken(folder, f"it names {record.path!r}, which is no name of a part")
        if manifest.model_config is not None and manifest.model_config.path != RunFolder.MODEL_CONFIG:
            raise broken(folder, f"it has the model's config in {manifest.model_config.path!r}")
        if parts_must_exist:
            require_files(folder, manifest)
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
                return cls.load(folder, parts_must_exist=False, path=RunFolder.MANIFEST_TWIN), str(error)
            except RunError:
                raise error from None

    def files(self) -> list[FileRecord]:
        """Every file that counts, examples.parquet included."""
        return [*([self.examples] if self.examples else []), *self.tokens, *self.moment_files, *self.parts]

    def as_json(self) -> dict[str, Any]:
        """As plain values of the kinds that JSON has."""
        values = asdict(self)
        beside = ("model_config", "examples", "tokens", "moment_files")
        files = {name: values.pop(name) for name in (*beside, "pending", "parts")}
        values["rows"] = self.row_counts()
        values["digest"] = self.digest
        values["digests"] = self.digests
        ordered = {
            "schema_version": self.schema_version,
            **values,
            **files,
        }
        for name in ("generation", "differences", "parts_at"):
            if not ordered[name]:
                del ordered[name]
        for part in (*files["pending"], *files["parts"]):
            if part["sections"] is None:
                del part["sections"]
        # A value that JSON does not know is written as text: better than to lose a night's rows over it.
        plain: dict[str, Any] = json.loads(json.dumps(ordered, ensure_ascii=False, default=str))
        return plain


def _from_json(values: Mapping[str, Any]) -> Manifest:
    names = [name for name in Manifest.__dataclass_fields__ if name in values]
    plain = {name: values[name] for name in names}
    if values["status"] not in STATUSES:
        raise ValueError(f"its status is {values['status']!r}, not one of {', '.join(STATUSES)}")
    manifest = Manifest(
        **plain
        | {
            "geometry": tuple(record_from(LayerGeometry, layer) for layer in values["geometry"]),
            "selection": {
                layer: {kind: tuple(heads) for kind, heads in kinds.items()}
                for layer, kinds in numbered(values["selection"]).items()
            },
            "scores": numbered(values.get("scores", {})),
            "differences": {
                layer: {kind: numbers(found) for kind, found in kinds.items()}
                for layer, kinds in numbered(values.get("differences", {})).items()
            },
            "rope": tuple(values.get("rope", ())),
            "sampler": from_json(values["sampler"]),
            "parts": tuple(part_from(part) for part in values["parts"]),
            "pending": tuple(part_from(part) for part in values.get("pending", ())),
            "resumes": tuple(values.get("resumes", ())),
            "tokens": tuple(record_from(FileRecord, record) for record in values.get("tokens", ())),
            "moment_files": tuple(record_from(FileRecord, record) for record in values.get("moment_files", ())),
            "examples": record_from(FileRecord, values["examples"]) if values["examples"] else None,
            "model_config": record_from(FileRecord, config) if (config := values.get("model_config")) else None,
        }
    )
    require_sense(manifest)
    return manifest
