"""With which probability each row of a run was kept: by its bucket, and where each side has a sampler, by its kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float64, Int32

from sniffer.errors import RunError
from sniffer.reader.vectors import probabilities
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.types import SECTION, Names

APART = 1 << 32
"""Between the buckets of two laws, which are 32-bit numbers."""


def inclusion_probability(folder: Path, manifest: Manifest, kinds: Iterable[str]) -> pl.Expr:
    """That of each row of a scan over some kinds, strictly: a bucket of no law is an error when it is met.

    Raises:
        RunError: the manifest gives no probability for a bucket that it has rows of.
    """
    laws: list[Mapping[int, float]] = []
    number: dict[str, int] = {}
    for kind in sorted(set(kinds)):
        law = law_of(folder, manifest, kind)
        if law not in laws:
            laws.append(law)
        number[kind] = laws.index(law)
    bucket = pl.col("bucket").cast(pl.Int64)
    if len(laws) > 1:
        first = pl.col("kind").cast(pl.String).replace_strict(number, return_dtype=pl.Int64)
        bucket = bucket + APART * first
    whole = {one + APART * place: value for place, law in enumerate(laws) for one, value in law.items()}
    keys = pl.Series(list(whole), dtype=pl.Int64)
    found = bucket.replace_strict(keys, list(whole.values()), return_dtype=pl.Float64)
    for kind in sorted(set(kinds)):
        if kept := manifest.kept_sections(kind):
            certain = (pl.col("kind").cast(pl.String) == kind) & pl.col(SECTION).is_in(kept)
            found = pl.when(certain).then(1.0).otherwise(found)
    return found


def of_buckets(
    folder: Path, manifest: Manifest, kind: str, buckets: Int32[np.ndarray, " n"], section: Names | None
) -> Float64[np.ndarray, " n"]:
    """With which rows of a kind were kept, by their buckets, and sections where there are some.

    Raises:
        RunError: the manifest does not know one.
    """
    law = law_of(folder, manifest, kind)
    if unknown := set(np.unique(buckets).tolist()) - law.keys():
        raise RunError(
            f"{folder} has rows of buckets {ranges(unknown)}, which its manifest does not know: "
            f"`python -m sniffer.runs verify {folder}` tells more"
        )
    return probabilities(law, buckets, section, manifest.kept_sections(kind))


def law_of(folder: Path, manifest: Manifest, kind: str) -> Mapping[int, float]:
    """The keep probability of each bucket of a kind; raises RunError where it lacks one that has rows.

    Of imported rows whose sampler nobody has told it is NaN.
    """
    law = manifest.probability_by_bucket(kind)
    there = {bucket for part in manifest.parts if part.kind == kind for bucket in part.buckets}
    if manifest.imported and not law:
        return dict.fromkeys(there, math.nan)
    if unknown := there - law.keys():
        raise RunError(
            f"{folder / RunFolder.MANIFEST} is broken: it gives no probability for buckets "
            f"{ranges(unknown)}; restore the file, or capture again"
        )
    return law


def ranges(values: Iterable[Any]) -> str:
    """Names values briefly: 0-29, 31."""
    values = list(values)
    if not all(isinstance(value, int) for value in values):
        return ", ".join(map(str, values))
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
