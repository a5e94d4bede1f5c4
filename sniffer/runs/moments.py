"""Whether moments are of all positions of the documents that a run lists, and of nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import polars as pl

from sniffer.errors import unbroken
from sniffer.sampler import Picker
from sniffer.storage.integrity import damage
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.moments import counts, documents_of
from sniffer.storage.schema import Example
from sniffer.types import KIND, NONE


def check_moments(
    folder: Path, manifest: Manifest, examples: Mapping[int, Example], picker: Picker | None
) -> Iterator[str]:
    """What is wrong, one line each.

    Args:
        picker: says in which bucket a position is; None where the run's sampler is not to be had.
    """
    layout = manifest.moments_layout
    if layout is None:
        return
    problems = [f"{record.path}: {wrong}" for record in manifest.moment_files if (wrong := damage(folder, record))]
    if problems:
        yield from problems
        return
    try:
        documents = [number for record in manifest.moment_files for number in documents_of(folder, record)]
        tables = [pl.DataFrame(pl.from_arrow(counts(folder, record))) for record in manifest.moment_files]
    except (OSError, ValueError) as error:
        yield f"{RunFolder.MOMENTS}: {unbroken(error)}"
        return
    if len(set(documents)) != len(documents):
        yield f"{RunFolder.MOMENTS}: a document has been counted twice"
    counted = set(documents)
    if fewer := sorted(examples.keys() - counted if manifest.status == "complete" else ()):
        yield f"{RunFolder.MOMENTS}: document {fewer[0]} has not been counted ({len(fewer)} such)"
    if picker is None or not tables:
        return
    there = [example for number, example in examples.items() if number in counted]
    expected = {side: _positions(picker.side(side), there, layout.sections) for side in ("q", "k")}
    found = pl.concat(tables).group_by("layer", "kind", "head", "bucket", "section").agg(pl.col("n").sum())
    if unknown := sorted(counted - examples.keys()):
        where = RunFolder.MOMENTS
        yield f"{where}: documents that examples.parquet does not list: {unknown[0]} ({len(unknown)} such)"
        return
    for layer in manifest.selection:
        for kind in layout.kinds:
            mine = found.filter(pl.col("layer") == layer, pl.col("kind") == kind)
            by_head = {
                head: {(bucket, section): n for bucket, section, n in one.select("bucket", "section", "n").iter_rows()}
                for (head,), one in mine.group_by("head")
            }
            others = sorted(str(head) for head, one in by_head.items() if one != expected[KIND[kind].draw])
            if others or not by_head:
                which = f"head {others[0]}" if others else "any head"
                yield (
                    f"{RunFolder.MOMENTS}: layer {layer}, kind {kind}: moments of {which} are not of as many positions "
                    "as the documents have in each bucket and section"
                )


def _positions(picker: Picker, examples: list[Example], sections: tuple[str, ...]) -> dict[tuple[int, str], int]:
    """How many positions the documents have, by bucket and section."""
    found: Counter[tuple[int, str]] = Counter()
    for example in examples:
        buckets = picker.buckets_until(example.n_tokens)[example.first_position :]
        names = np.full(example.n_tokens, NONE, dtype=object)
        if sections and example.sections is not None:
            named = example.sections.names
            names = np.where(named.among(sections), named.array, NONE)
        names = names[example.first_position :]
        for name in set(names.tolist()):
            numbers, times = np.unique(buckets[names == name], return_counts=True)
            found.update({(int(b), str(name)): int(n) for b, n in zip(numbers, times, strict=True)})
    return dict(found)
