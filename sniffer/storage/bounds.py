"""What cannot be in a manifest: whoever reads one may count, draw or make room by its numbers (limits.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sniffer.limits import BUCKET, DIM, HEADS, LARGEST, LAYERS, ROWS_PER_BYTE, THREADS, TOKENS
from sniffer.sampler import SIDES
from sniffer.storage.law import kept_whole, laws, side_of
from sniffer.storage.schema import MOST_SECTIONS
from sniffer.storage.well_formed import misfits
from sniffer.types import ALL_KINDS, ATTENTION, STATISTICS, LayerGeometry, by_number

if TYPE_CHECKING:
    from sniffer.storage.manifest import Manifest


def implausible(manifest: Manifest) -> Iterator[str]:
    """What cannot be, one phrase each; types are checked already."""
    for name, value, least, most in _numbers(manifest):
        if not least <= value <= most:
            yield f"{name} is {value}, not from {least} to {most}"
    for part in (*manifest.parts, *manifest.pending):
        if stands_for_too_much(part.rows, part.bytes):
            yield f"{part.path} has {part.bytes:,} bytes that stand for {part.rows:,} rows"
    geometry = by_number(manifest.geometry)
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
    for rope in manifest.rope:
        yield "pairs of rope", len(rope["inv_freq"]), 0, DIM
        yield "the first dimension of rope", rope["first"], 0, DIM
    kept = [] if manifest.model_config is None else [manifest.model_config]
    for record in [*manifest.files(), *manifest.pending, *kept]:
        yield from ((f"{name} of {record.path}", getattr(record, name), 0, LARGEST) for name in ("rows", "bytes"))
    for part in (*manifest.parts, *manifest.pending):
        yield f"commit of {part.path}", part.commit, 0, LARGEST
        for name in ("rows_with_nan", "rows_with_infinity"):
            if (count := getattr(part, name)) is not None:
                yield f"{name} of {part.path}", count, 0, part.rows
        yield from ((f"a bucket of {part.path}", bucket, 0, BUCKET) for bucket in part.buckets)
        yield from ((f"rows of a bucket of {part.path}", rows, 0, LARGEST) for rows in part.buckets.values())
        sections = part.sections or {}
        yield f"sections of {part.path}", len(sections), 0, MOST_SECTIONS
        yield from ((f"rows of a section of {part.path}", rows, 0, LARGEST) for rows in sections.values())
    yield from ((f"counts.{name}", count, 0, LARGEST) for name, count in manifest.counts.items())
    yield from ((f"timings.{name}", value, -LARGEST, LARGEST) for name, value in manifest.timings.items())
    for _, law in laws(manifest.sampler):
        yield from _law(law)
    yield "rows", sum(part.rows for part in manifest.parts), 0, LARGEST
    yield "bytes", sum(part.bytes for part in manifest.parts), 0, LARGEST


def _law(probability_by_bucket: Mapping[int, float]) -> Iterator[tuple[str, float, float, float]]:
    for bucket, probability in probability_by_bucket.items():
        yield "a bucket of the sampler", bucket, 0, BUCKET
        yield f"the probability of bucket {bucket}", probability, 0, 1


def _heads(layer: LayerGeometry, kind: str, heads: tuple[Any, ...]) -> Iterator[str]:
    if list(heads) != sorted(set(heads)) or not all(0 <= head < layer.heads[kind] for head in heads[:1] + heads[-1:]):
        yield f"it selects heads of layer {layer.layer}, kind {kind}, that are not some of its {layer.heads[kind]}"


MOST = {"layer": LAYERS, "head": HEADS, "bucket": BUCKET, "position": TOKENS - 1, "dim": DIM}
"""Of what places a row, and the numbers of a vector; whoever reads rows of others holds them to it."""


def stands_for_too_much(rows: int, n_bytes: int) -> bool:
    """Whether a file of so many bytes can hold no such number of rows."""
    return rows > ROWS_PER_BYTE * n_bytes


FACTS = (
    ("softcap", float | None),
    ("sinks", list[float] | None),
    ("alibi", list[float] | None),
    ("missing", str | None),
)
"""Of a layer in `scores`, and what they are in JSON."""

ROPE = (
    ("layers", list[int]),
    ("inv_freq", list[float]),
    ("layout", str),
    ("first", int),
    ("attention_factor", float),
    ("parameters", Mapping[str, Any]),
    ("layer_type", str | None),
    ("until", int | None),
    ("missing", str),
)
"""Of an entry in `rope`."""


def require_sense(manifest: Manifest) -> None:
    """Whoever reads a manifest may come to rely on what is checked here.

    Raises:
        ValueError: a value is of another type than its annotation, or names what is not there.
    """
    for wrong in misfits(manifest, type(manifest), ""):
        raise ValueError(wrong)
    loose: tuple[tuple[str, Any, Any], ...] = (
        *((f"sampler.{side}.probability_by_bucket", law, Mapping[int, float]) for side, law in laws(manifest.sampler)),
        *((f"sampler.{side}.seed_by", side_of(manifest.sampler, side).get("seed_by", []), list) for side in SIDES),
        ("sampler.seed_by", manifest.sampler.get("seed_by", []), list),
        *(
            (f"sampler.{side}.keep_sections", tuple(kept_whole(manifest.sampler, side)), tuple[str, ...])
            for side in SIDES
        ),
        ("dataset.shard", manifest.dataset.get("shard", {}), Mapping[str, int]),
        *((f"scores.{n}.{name}", one.get(name), hint) for n, one in manifest.scores.items() for name, hint in FACTS),
        *((f"rope[{n}].{name}", one.get(name), hint) for n, one in enumerate(manifest.rope) for name, hint in ROPE),
        *((f"resumes[{n}].differences", one.get("differences", []), list) for n, one in enumerate(manifest.resumes)),
    )
    for name, value, hint in loose:
        for wrong in misfits(value, hint, name):
            raise ValueError(wrong)
    datetime.fromisoformat(manifest.created)
    shaped = {
        (layer.layer, kind)
        for layer in manifest.geometry
        for kind in layer.heads.keys() & layer.dims.keys() & set(ALL_KINDS)
        if layer.dims[kind] > 0
    }
    for number, captured in manifest.selection.items():
        for kind in captured:
            if (number, kind) not in shaped:
                raise ValueError(f"it selects kind {kind!r} of layer {number}, of which it gives no shape")
    _require_layout(manifest)
    for part in (*manifest.parts, *manifest.pending):
        if part.kind not in manifest.selection.get(part.layer, {}):
            raise ValueError(f"it names a part of kind {part.kind!r} of layer {part.layer}, which it does not select")
    for wrong in implausible(manifest):
        raise ValueError(wrong)


def _require_layout(manifest: Manifest) -> None:
    """Statistics of attention have the columns that are told of them."""
    layers = [number for number, kinds in manifest.selection.items() if ATTENTION in kinds]
    if not layers and manifest.attention is None:
        return
    if manifest.attention is None:
        raise ValueError("it selects statistics of attention and does not say which")
    named = {"statistics": list[str], "buckets": int, "distances": int, "top": int}
    for name, hint in named.items():
        for wrong in misfits(manifest.attention.get(name), hint, f"attention.{name}"):
            raise ValueError(wrong)
    for wrong in misfits(manifest.attention.get("sections", []), list, "attention.sections"):
        raise ValueError(wrong)
    if unknown := [name for name in manifest.attention["statistics"] if name not in STATISTICS]:
        raise ValueError(f"attention.statistics names {unknown}, which this release does not know")
    layout, geometry = manifest.layout, by_number(manifest.geometry)
    if layout is None or min(layout.buckets, layout.distances, layout.top) < 0:
        raise ValueError("attention has columns of less than no width")
    for number in layers:
        layer = geometry[number]
        if layer.dims[ATTENTION] != layout.width(layer.dims["v"]):
            raise ValueError(
                f"attention has {layer.dims[ATTENTION]} numbers a row in layer {number}, not those it names"
            )
