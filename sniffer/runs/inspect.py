"""`runs inspect RUN`: what a run is, and how much of what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from sniffer.reader.folders import state
from sniffer.reader.laws import ranges
from sniffer.runs.code import code_of
from sniffer.runs.listing import age, sampler_of
from sniffer.storage.away import elsewhere
from sniffer.storage.manifest import Manifest
from sniffer.storage.mirror import state as state_of_mirror
from sniffer.terminal.printing import Grid, facts_table
from sniffer.terminal.sections import section_table
from sniffer.terminal.summary import bucket_title, kinds_by_law, moments_fact, not_finite_line, rows_by_bucket
from sniffer.types import LayerGeometry, Rope, by_number
from sniffer.words import size


def tables(folder: Path) -> Iterator[RenderableType]:
    """The facts, the layers, and the vectors by bucket and by section.

    Raises:
        RunError: not a run folder, or one that cannot be read.
    """
    manifest = Manifest.load(folder, parts_must_exist=False)
    yield facts_table(str(folder), _values(folder, manifest), fold=True)
    yield _layers(manifest)
    yield from (_buckets(manifest, kinds) for kinds in kinds_by_law(manifest))
    with suppress(OSError, ValueError):  # a damaged file of documents is what verify tells of
        if (sections := section_table(folder, manifest)) is not None:
            yield sections


def _values(folder: Path, manifest: Manifest) -> dict[str, str]:
    status = state(folder, manifest)
    facts = {
        "status": f"{status} ({manifest.reason})" if manifest.reason else status,
        "created": f"{manifest.created} ({age(manifest.created)} ago)",
        "model": _pairs(manifest.model, ("checkpoint", "architecture", "weights", "geometry", "revision", "commit"))
        + stand_in_line(manifest.model),
        "device": _pairs(manifest.device) + f", threads {manifest.threads}",
        "backbone": _pairs({name: value for name, value in manifest.backbone.items() if name != "code"}),
        "code": _pairs({name.rpartition(".")[2]: told for name, told in code_of(manifest).items()}),
        "rope": "; ".join(map(_rope, manifest.rope)),
        "dataset": _pairs(manifest.dataset, ("path", "name", "split", "documents", "shard", "package", "imported")),
        **({} if manifest.generation is None else {"generation": _pairs(manifest.generation)}),
        "sampler": f"{sampler_of(manifest)}, seed {manifest.seed}",
        "documents": _pairs(manifest.counts),
        "vectors": f"{manifest.rows:,} in {len(manifest.parts):,} parts, {size(manifest.bytes)}"
        + elsewhere(folder, manifest),
        "token ids": _tokens(manifest),
        **moments_fact(manifest),
        "not finite": not_finite_line(manifest),
        "commits": f"{len({part.commit for part in manifest.parts}):,}",
        "seconds": _pairs(manifest.timings),
        "versions": _pairs(manifest.versions),
        "digest": manifest.digest,
        **({} if (mirrored := state_of_mirror(folder, manifest)) is None else {"mirror": mirrored}),
    }
    if manifest.pending:
        facts["pending"] = f"{len(manifest.pending):,} parts, {size(sum(part.bytes for part in manifest.pending))}"
    for resume in manifest.resumes:
        if resume.get("extended"):
            facts[f"extended {resume.get('at', '?')}"] = f"beyond {resume.get('examples', '?')} documents"
            continue
        changed = f", with {'; '.join(map(str, resume['differences']))}" if resume.get("differences") else ""
        facts[f"resumed {resume.get('at', '?')}"] = f"stopped by {resume.get('stopped_by', '?')}{changed}"
    return facts


def _rope(entry: Mapping[str, Any]) -> str:
    """What turns some layers' q and k."""
    rope, layers = Rope.from_json(entry), f"layers {ranges(entry['layers'])}"
    if rope.missing or not rope.inv_freq:
        return f"{layers} {rope.missing or 'turn nothing'}"
    until = f", in texts of {rope.until:,} tokens at most" if rope.until else ""
    return f"{layers} {_pairs(rope.parameters)}, {rope.rotary} dimensions ({rope.layout}){until}"


def _tokens(manifest: Manifest) -> str:
    kept = sum(record.rows for record in manifest.tokens)
    return f"of {kept:,} documents, {size(sum(record.bytes for record in manifest.tokens))}" if kept else "not kept"


def _pairs(values: Mapping[str, Any], names: tuple[str, ...] | None = None) -> str:
    shown = {name: values.get(name) for name in names or values}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value not in (None, {}, [], ""))


def stand_in_line(model: Mapping[str, Any]) -> str:
    """Whose tokenizer stands in for the checkpoint's own, if one does."""
    tokenizer = model.get("tokenizer")
    if not isinstance(tokenizer, Mapping) or not tokenizer.get("stand_in"):
        return ""
    return f", tokenizer of {tokenizer.get('source')}, a stand-in"


def _layers(manifest: Manifest) -> Table:
    kinds = list(manifest.rows_by_kind) or [kind for kinds in manifest.selection.values() for kind in kinds]
    table = Grid(title="layers")
    for name in ("layer", "heads", "dim", "window", *dict.fromkeys(kinds), "bytes"):
        table.add_column(name, justify="right")
    geometry = by_number(manifest.geometry)
    for number, captured in manifest.selection.items():
        parts = [part for part in manifest.parts if part.layer == number]
        rows = {kind: sum(part.rows for part in parts if part.kind == kind) for kind in dict.fromkeys(kinds)}
        layer = geometry[number]
        heads = ", ".join(f"{kind} {len(heads)}/{layer.heads[kind]}" for kind, heads in captured.items())
        table.add_row(
            str(number),
            heads,
            _dims(layer, captured),
            _sees(layer),
            *(f"{count:,}" for count in rows.values()),
            size(sum(part.bytes for part in parts)),
        )
    return table


def _sees(layer: LayerGeometry) -> str:
    """What a query of a layer attends to."""
    window = "full" if layer.sliding_window is None else f"{'chunks of ' * layer.chunked}{layer.sliding_window}"
    return f"{window}, selected" if layer.selects else window


def _dims(layer: LayerGeometry, captured: Mapping[str, Any]) -> str:
    return "/".join(map(str, dict.fromkeys(layer.dims[kind] for kind in captured)))


def _buckets(manifest: Manifest, kinds: Sequence[str]) -> Table:
    table = Grid(title=bucket_title(manifest, kinds))
    for name in ("bucket", "probability", *kinds):
        table.add_column(name, justify="right")
    law = manifest.probability_by_bucket(kinds[0])
    for bucket, rows in rows_by_bucket(manifest, kinds).items():
        table.add_row(str(bucket), f"{law.get(bucket, float('nan')):.3g}", *(f"{count:,}" for count in rows.values()))
    return table
