"""What a run will capture and has captured, in lines and tables."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import rich
from rich.table import Table

from sniffer.config.schema import OWN_CLUSTER
from sniffer.forward.estimate import Estimate
from sniffer.reader.run import Run
from sniffer.sampler import Picker
from sniffer.storage.finite import NotFinite
from sniffer.storage.law import side_of
from sniffer.storage.manifest import INSIDE_INFERENCE, Manifest
from sniffer.terminal.generation import difference_table, generated_speed
from sniffer.terminal.printing import Grid, facts_table, say
from sniffer.terminal.sections import section_table
from sniffer.types import ATTENTION, KIND, ModelLimits
from sniffer.words import size


def estimate_line(expected: Estimate) -> str:
    about = "" if expected.exact_lengths else "about "
    kinds = ", ".join(f"{kind} {rows:,.0f}" for kind, rows in expected.rows.items())
    return (
        f"expecting {about}{expected.vectors:,.0f} vectors ({kinds}): "
        f"{size(expected.ram_bytes + 2 * expected.moments_bytes)} of RAM, {size(expected.file_bytes)} on disk"
    )


def resume_line(folder: Path, manifest: Manifest) -> str:
    """How to go on with a run that was stopped."""
    documents = f"{manifest.examples.rows:,}" if manifest.examples else "no"
    command = ["python", "-m", "sniffer.runs", "resume", str(folder)]
    engine = manifest.config.get("engine")
    address = engine.get("address") if isinstance(engine, Mapping) else None
    if address not in OWN_CLUSTER:
        command += ["--engine-address", str(address)]
    output = manifest.config.get("output")
    if mirror := manifest.parts_at or (output.get("mirror") if isinstance(output, Mapping) else None):
        command += ["--mirror", str(mirror)]
    return f"{documents} documents are kept; to go on: {shlex.join(command)}"


def to_extend(limits: ModelLimits, tokens: int) -> str:
    """How a model may come to take that many tokens."""
    key, rows = limits.position_key, tokens + limits.rows_before
    override = f"'model.config_overrides={{{key}: {rows}}}'"
    if limits.reach is not None and limits.max_positions is not None:
        factor = math.ceil(tokens / limits.max_positions)
        return f"or extend its RoPE scaling with 'model.config_overrides={{rope_parameters: {{factor: {factor}.0}}}}'"
    if limits.rope:
        return f"or extend the model with {override} and a RoPE scaling"
    return f"or, unless its positions are learned, extend the model with {override}"


def remarks(counts: Mapping[str, int], longest: int | None, fixed: str | None = None) -> Iterator[str]:
    """What a user should know of texts that are not in a run as they are.

    Args:
        longest: the tokens that each could have.
        fixed: the key that says how long documents are, `window` or `pack_to`, if one does.
    """
    if dropped := counts.get("dropped"):
        way = "dataset.max_tokens=null" + ("" if fixed == "window" else f" dataset.window={longest}")
        if fixed == "pack_to":
            way = f"{way} in place of dataset.pack_to, or a larger one"
        yield f"{dropped:,} tokens beyond the first {longest:,} of their texts were cut off: to keep them, {way}"
    if begun := counts.get("begun"):
        yield (
            f"{begun:,} texts bring their own token of the beginning, and got no second one; "
            "dataset.special_tokens=none adds no special token to any"
        )


MAX_BUCKET_LINES = 24


def show_summary(folder: Path, manifest: Manifest, picker: Picker) -> None:
    """Prints what a run captured, by kind, bucket and section, and the folder, which stands alone on the last line."""
    console = rich.get_console()
    with console.capture() as whole:
        console.print(facts_table("captured", _facts(manifest)))
        for kinds in kinds_by_law(manifest):
            console.print(_bucket_table(manifest, kinds, picker.side(KIND[kinds[0]].draw)))
        more = attention_table(folder, manifest), section_table(folder, manifest), difference_table(manifest)
        for table in more:
            if table is not None:
                console.print(table)
        if manifest.not_finite:
            say(f"warning: {not_finite_line(manifest)}", style="yellow")
        say(folder, style="bold")
    # In one piece: jobs of a sweep may share the terminal.
    console.file.write(whole.get())
    console.file.flush()


def _facts(manifest: Manifest) -> dict[str, str]:
    counts, seconds = manifest.counts, manifest.timings
    layers = list(manifest.selection)
    new = "" if manifest.generation is None else f", {counts.get('generated', 0):,} of them generated"
    rate = f"{counts['tokens'] / max(1e-9, seconds['inference']):,.0f} tokens/s{generated_speed(manifest)}"
    by = f" by {counts['dropped']:,} tokens" if counts.get("dropped") else ""
    short = f" and {counts['skipped_short']:,} short" if counts.get("skipped_short") else ""
    return {
        "documents": f"{counts['examples']:,} ({counts['truncated']:,} truncated{by}, "
        f"{counts['skipped_empty']:,} empty{short} ones skipped), {counts['tokens']:,} tokens{new}",
        "layers": f"{len(layers)} of {len(manifest.geometry)}",
        "vectors": f"{manifest.rows:,} in {len(manifest.parts)} files, {size(manifest.bytes)}",
        **moments_fact(manifest),
        "seconds": _stages(seconds),
        # The seconds of a session that was killed are not known.
        **({} if manifest.resumes else {"speed": rate}),
        "digest": manifest.digest,
    }


def moments_fact(manifest: Manifest) -> dict[str, str]:
    """Of which kinds and positions a run has moments; nothing where it has none."""
    layout = manifest.moments_layout
    if layout is None:
        return {}
    held = size(sum(record.bytes for record in manifest.moment_files))
    return {"moments": f"{', '.join(layout.kinds)} at all {manifest.counts.get('tokens', 0):,} positions, {held}"}


SHOWN = 6
"""Layers that a line names."""


def not_finite_line(manifest: Manifest) -> str:
    """How many vectors hold a number that is not finite, and of which layers and kinds."""
    found = manifest.not_finite
    if not found:
        return "none" if manifest.counts_not_finite else "unknown: an early release did not count"
    total = sum((one for kinds in found.values() for one in kinds.values()), NotFinite())
    layers = [f"layer {layer} {_kinds(kinds)}" for layer, kinds in found.items()]
    more = f"; and {len(layers) - SHOWN} more layers" if len(layers) > SHOWN else ""
    return f"of {manifest.rows:,} vectors {total}: {'; '.join(layers[:SHOWN])}{more}"


def _kinds(kinds: Mapping[str, NotFinite]) -> str:
    return ", ".join(f"{kind} ({found})" for kind, found in kinds.items())


def _stages(seconds: Mapping[str, float]) -> str:
    inside = ", ".join(f"{stage} {seconds[stage]:.2f}" for stage in INSIDE_INFERENCE if stage in seconds)
    outer = {stage: value for stage, value in seconds.items() if stage not in INSIDE_INFERENCE}
    return ", ".join(
        f"{stage} {value:.1f}" + (f" ({inside})" if stage == "inference" and inside else "")
        for stage, value in outer.items()
    )


def _bucket_table(manifest: Manifest, kinds: Sequence[str], picker: Picker) -> Table:
    rows = rows_by_bucket(manifest, kinds)
    table = Grid(title=bucket_title(manifest, kinds), show_footer=True)
    table.add_column("bucket", "total", justify="right")
    table.add_column("positions", justify="right")
    for kind in kinds:
        table.add_column(kind, f"{manifest.rows_by_kind[kind]:,}", justify="right")
    shown, rest = list(rows)[:MAX_BUCKET_LINES], list(rows)[MAX_BUCKET_LINES:]
    for bucket in shown:
        first, last = picker.span(bucket)
        table.add_row(str(bucket), f"{first:,} to {last:,}", *(f"{n:,}" for n in rows[bucket].values()))
    if rest:
        sums = (sum(rows[bucket][kind] for bucket in rest) for kind in kinds)
        table.add_row(f"{len(rest)} more", f"to {picker.span(rest[-1])[1]:,}", *(f"{n:,}" for n in sums))
    return table


SUMMED = {
    "entropy": ("entropy", pl.col("entropy").median(), ".2f"),
    "first": ("first", pl.col("first").mean(), ".1%"),
    "self": ("self", pl.col("self").mean(), ".1%"),
    "sink": ("sinks", pl.col("sink").mean(), ".1%"),
    "top": ("largest", pl.col("top").arr.first().mean(), ".1%"),
}
"""Statistics of attention that are shown by layer: title, how they are summed up, and how they are written."""


def attention_table(folder: Path, manifest: Manifest) -> Table | None:
    """What queries do with their keys, by layer: the median of entropies, means of weights. None without any rows."""
    run = Run(folder, manifest)
    names = [name for name in SUMMED if name in run.statistics]
    if not names or not manifest.rows_by_kind.get(ATTENTION):
        return None
    rows = run.scan(kind=ATTENTION).group_by("layer").agg(SUMMED[name][1] for name in names).sort("layer").collect()
    table = Grid(title="attention of the sampled queries: median entropy (nats), mean weights")
    for title in ("layer", *(SUMMED[name][0] for name in names)):
        table.add_column(title, justify="right")
    for number in _spread(len(rows), MAX_LAYER_LINES):
        row = rows.row(number, named=True)
        table.add_row(str(row["layer"]), *(format(row[name], SUMMED[name][2]) for name in names))
    return table


MAX_LAYER_LINES = 12


def _spread(n: int, most: int) -> list[int]:
    """At most so many of n things, the first and the last among them, evenly spread."""
    return sorted({round(place * (n - 1) / max(1, most - 1)) for place in range(most)}) if n > most else list(range(n))


def kinds_by_law(manifest: Manifest) -> list[list[str]]:
    """The captured kinds, those together that have buckets in common: all, but where each side has a sampler."""
    kinds = list(manifest.rows_by_kind)
    sides = [side_of(manifest.sampler, KIND[kind].draw) for kind in kinds]
    found = [[kind for kind, side in zip(kinds, sides, strict=True) if side is one] for one in _once(sides)]
    return [some for some in found if some]


def _once(values: Sequence[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if not any(value is other for other in values[:place])]


def bucket_title(manifest: Manifest, kinds: Sequence[str]) -> str:
    whole = len(kinds_by_law(manifest)) == 1
    return "vectors by bucket" if whole else f"vectors by bucket, {', '.join(kinds)}"


def rows_by_bucket(manifest: Manifest, kinds: Sequence[str]) -> dict[int, dict[str, int]]:
    """Rows by bucket, then kind; every kind in every bucket, in ascending order of buckets."""
    parts = [part for part in manifest.parts if part.kind in kinds]
    rows = {bucket: dict.fromkeys(kinds, 0) for bucket in sorted({bucket for part in parts for bucket in part.buckets})}
    for part in parts:
        for bucket, count in part.buckets.items():
            rows[bucket][part.kind] += count
    return rows
