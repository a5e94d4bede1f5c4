"""`runs reproduce RUN`: runs a saved configuration again, into a new folder, and compares every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sniffer.config.saving import save_plain
from sniffer.config.trust import Trust, allowed, build, needed_config
from sniffer.errors import RunError
from sniffer.process.threads import same_threads
from sniffer.reader.run import Run
from sniffer.runs.code import told_copies
from sniffer.runs.imports.told import refuse_imported
from sniffer.storage.layout import RunFolder
from sniffer.storage.lock import hold
from sniffer.storage.made_folder import holds_rows, made
from sniffer.storage.manifest import Manifest
from sniffer.storage.same_run import differences
from sniffer.types import NONE, SECTION

MERGED = 1e-12
"""Relative difference of sums in float64 that were merged in another order."""

KEY = ("head", "example_id", "position")


@dataclass(frozen=True)
class Distance:
    """How far two runs are apart: rows that only one has, and the difference of the vectors that both have.

    `largest` is the largest absolute difference of two numbers, `relative` the largest norm of a difference
    over the norm of the first run's vector; `differing` counts vectors that are not equal to the bit, `resectioned` the
    rows that both have and that are of another section in each.
    """

    rows: int = 0
    only_first: int = 0
    only_second: int = 0
    differing: int = 0
    largest: float = 0.0
    relative: float = 0.0
    resectioned: int = 0

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.rows + other.rows,
            self.only_first + other.only_first,
            self.only_second + other.only_second,
            self.differing + other.differing,
            max(self.largest, other.largest),
            max(self.relative, other.relative),
            self.resectioned + other.resectioned,
        )


def reproduce(folder: Path, target: Path, trust: Trust) -> tuple[bool, list[str]]:
    """Runs the configuration of a complete run again and compares.

    Returns:
        Whether all rows are identical, and what to tell, line by line.

    What fails leaves no folder, unless rows were captured that a resume can go on with.

    Raises:
        RunError: the run is not complete, or the target exists.
        SnifferError: as a fresh run.
    """
    first = Manifest.load(folder)
    refuse_imported(folder, first, "reproduced")
    if first.status != "complete":
        raise RunError(f"{folder} is {first.status}: `python -m sniffer.runs resume {folder}` completes it first")
    if target.exists():
        raise RunError(f"{target} exists already: choose another folder with --to")
    plain = allowed(needed_config(folder), trust, folder / RunFolder.CONFIG)
    config = build(plain, trust, folder / RunFolder.CONFIG)

    from sniffer.capture import run

    with made(target, holds_rows), hold(target), same_threads(first.threads):
        (target / RunFolder.REPRODUCES).write_text(f"{first.digest}\n", encoding="utf-8")
        save_plain(target, plain)
        run(config, target)
    second = Manifest.load(target)
    copies = list(told_copies(first, trust.prefixes))
    apart = moments_apart(Run(folder, first), Run(target, second))
    if first.digest == second.digest:
        told, differing = f"identical: {first.rows:,} rows, digest {first.digest}", elsewhere(first, second)
        if apart is not None:
            told += f"; moments differ by at most {apart:.2g} of their size"
        although = [f"although these differ: {'; '.join(differing)}"] if differing else []
        return (apart or 0.0) <= MERGED, [told, *copies, *although]
    return False, [*_told(compare(Run(folder, first), Run(target, second)), first, second), *copies]


def compare(first: Run, second: Run) -> Distance:
    """Row by row, one (layer, kind) at a time."""
    pairs = [run.all_captured for run in (first, second)]
    total = Distance()
    for layer, kind in sorted(pairs[0] | pairs[1]):
        for run in (first, second):
            if (layer, kind) in run.all_captured:
                run.check(layer, kind)
        frames = [
            _numbers(run, layer, kind) if (layer, kind) in there else None
            for run, there in zip((first, second), pairs, strict=True)
        ]
        total += _distance(*frames)
    return total


def moments_apart(first: Run, second: Run) -> float | None:
    """The largest difference of two moments, over the largest of their kind and head; None where no run has any."""
    layout = first.manifest.moments_layout
    if layout is None or layout != second.manifest.moments_layout or not first.manifest.moment_files:
        return None
    largest = 0.0
    for layer in first.layers:
        for kind in layout.kinds:
            for head in first.counted_heads(layer, kind):
                one, other = (run.moments(layer=layer, head=head, kind=kind) for run in (first, second))
                for name in ("n", "mean", "minimum", "maximum", "norm", "pairs", "squares", "products"):
                    values = [getattr(moments, name) for moments in (one, other)]
                    if values[0] is not None:
                        largest = max(largest, _apart(*(np.asarray(value, dtype=np.float64) for value in values)))
    return largest


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    size = np.abs(one[np.isfinite(one)]).max(initial=1e-300)
    return float(np.abs(difference(one, other)).max(initial=0.0) / size)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Number by number. A NaN that both have is none in size; one that only one of them has is one without bound."""
    with np.errstate(invalid="ignore"):
        found = np.where((one == other) | (np.isnan(one) & np.isnan(other)), 0.0, one - other)
    found[np.isnan(found)] = np.inf
    return found


def _numbers(run: Run, layer: int, kind: str) -> pl.DataFrame:
    """All rows of one (layer, kind) with their sections, the numbers of each as one `vector`."""
    frame = run.scan([layer], [kind]).sort(KEY).collect()
    section = frame[SECTION].cast(pl.String) if SECTION in frame.columns else pl.lit(NONE)
    frame = frame.with_columns(section.alias(SECTION))
    names = [column.name for column in run.manifest.columns(layer, kind)]
    if names == ["vector"]:
        return frame.select(*KEY, SECTION, "vector")
    pieces = [frame[name].to_numpy().reshape(len(frame), -1) for name in names]
    return frame.select(*KEY, SECTION).with_columns(vector=np.concatenate(pieces, axis=1, dtype=np.float32))


def _distance(first: pl.DataFrame | None, second: pl.DataFrame | None) -> Distance:
    if first is None or second is None:
        return Distance(only_first=0 if first is None else len(first), only_second=0 if second is None else len(second))
    both = first.select(KEY).join(second.select(KEY), on=KEY)
    met = [frame.join(both, on=KEY, how="semi").sort(KEY) for frame in (first, second)]
    shared = [frame["vector"].to_numpy() for frame in met]
    alone = {"only_first": len(first) - len(both), "only_second": len(second) - len(both)}
    if not len(both) or shared[0].shape != shared[1].shape:
        return Distance(rows=len(both), differing=len(both), **alone)
    one, other = (np.ascontiguousarray(vectors, dtype=np.float32) for vectors in shared)
    differing = one.view(np.uint32) != other.view(np.uint32)
    wide = one.astype(np.float64)
    apart = difference(wide, other)
    lengths = np.linalg.norm(np.nan_to_num(wide, posinf=0.0, neginf=0.0), axis=1)
    norms = np.linalg.norm(apart, axis=1) / np.maximum(lengths, 1e-30)
    return Distance(
        len(both),
        **alone,
        differing=int(differing.any(axis=1).sum()),
        largest=float(np.abs(apart).max()),
        relative=float(norms.max()),
        resectioned=int((met[0][SECTION] != met[1][SECTION]).sum()),
    )


def _told(distance: Distance, first: Manifest, second: Manifest) -> Iterator[str]:
    yield (
        f"not identical: {distance.differing:,} of {distance.rows:,} vectors differ, by at most {distance.largest:.3g} "
        f"in a number and {distance.relative:.3g} of a vector's length"
    )
    if distance.only_first or distance.only_second:
        yield f"{distance.only_first:,} rows are in the first run only, {distance.only_second:,} in the second only"
    if distance.resectioned:
        yield f"{distance.resectioned:,} rows that both have are of another section in each"
    yield "what differs: " + ("; ".join(elsewhere(first, second)) or "nothing that the manifests record")


def elsewhere(first: Manifest, second: Manifest) -> list[str]:
    """What rows may depend on and is not the same in both runs."""
    found = differences(first.as_json(), second.as_json())
    return [
        *found,
        *([] if first.threads == second.threads else [f"threads: {first.threads} then, {second.threads} now"]),
    ]
