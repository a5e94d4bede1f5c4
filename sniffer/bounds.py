"""The largest numbers that a run can have, and a manifest with others is none of ours.

They follow from the columns of a part (layers and heads are 16-bit numbers, buckets and positions 32-bit ones) and from
what any machine can do. Whoever reads a manifest may count, draw or make room by its numbers: a few characters could
ask for a terabyte, so they are looked at first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sniffer.manifest import Manifest
    from sniffer.types import LayerGeometry

LAYERS = HEADS = (1 << 15) - 1
DIM = 1 << 20
BUCKET = (1 << 31) - 1
THREADS = 1024
LARGEST = (1 << 63) - 1
"""Of counts, rows and bytes."""

ROWS_PER_BYTE = 16
"""Of a part: token ids of real text take more, whatever the vectors are."""

TOKENS = 1 << 25
"""Of one document. Its draws take a table of a gigabyte; the longest context of any model is a third of it."""


def implausible(manifest: Manifest) -> Iterator[str]:
    """What cannot be, one phrase each; types are checked already."""
    for name, value, least, most in _numbers(manifest):
        if not least <= value <= most:
            yield f"{name} is {value}, not from {least} to {most}"
    for part in (*manifest.parts, *manifest.pending):
        if part.rows > ROWS_PER_BYTE * part.bytes:
            yield f"{part.path} has {part.bytes:,} bytes that stand for {part.rows:,} rows"
    geometry = {layer.layer: layer for layer in manifest.geometry}
    if len(geometry) != len(manifest.geometry):
        yield "its geometry has a layer twice"
    for layer, kinds in manifest.selection.items():
        for kind, heads in kinds.items():
            yield from _heads(geometry[layer], kind, heads)


def _numbers(manifest: Manifest) -> Iterator[tuple[str, float, float, float]]:
    """Name, value, least and most of every number that someone may count by."""
    if manifest.threads is not None:
        yield "threads", manifest.threads, 1, THREADS
    for layer in manifest.geometry:
        yield "a layer's number", layer.layer, 0, LAYERS
        yield from ((f"dims.{kind}", dim, 0, DIM) for kind, dim in layer.dims.items())
        yield from ((f"heads.{kind}", heads, 0, HEADS) for kind, heads in layer.heads.items())
    for record in manifest.files() + list(manifest.pending):
        yield from ((f"{name} of {record.path}", getattr(record, name), 0, LARGEST) for name in ("rows", "bytes"))
    for part in (*manifest.parts, *manifest.pending):
        yield f"commit of {part.path}", part.commit, 0, LARGEST
        for name in ("rows_with_nan", "rows_with_infinity"):
            if (count := getattr(part, name)) is not None:
                yield f"{name} of {part.path}", count, 0, part.rows
        yield from ((f"a bucket of {part.path}", bucket, 0, BUCKET) for bucket in part.buckets)
        yield from ((f"rows of a bucket of {part.path}", rows, 0, LARGEST) for rows in part.buckets.values())
    yield from ((f"counts.{name}", count, 0, LARGEST) for name, count in manifest.counts.items())
    yield from ((f"timings.{name}", value, -LARGEST, LARGEST) for name, value in manifest.timings.items())
    yield from _law(manifest.sampler.get("probability_by_bucket", {}))
    yield "rows", sum(part.rows for part in manifest.parts), 0, LARGEST
    yield "bytes", sum(part.bytes for part in manifest.parts), 0, LARGEST


def _law(probability_by_bucket: Mapping[int, float]) -> Iterator[tuple[str, float, float, float]]:
    for bucket, probability in probability_by_bucket.items():
        yield "a bucket of the sampler", bucket, 0, BUCKET
        yield f"the probability of bucket {bucket}", probability, 0, 1


def _heads(layer: LayerGeometry, kind: str, heads: tuple[Any, ...]) -> Iterator[str]:
    if list(heads) != sorted(set(heads)) or not all(0 <= head < layer.heads[kind] for head in heads[:1] + heads[-1:]):
        yield f"it selects heads of layer {layer.layer}, kind {kind}, that are not some of its {layer.heads[kind]}"
