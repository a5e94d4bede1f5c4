"""What a run has of moments, merged over its files, and over buckets and sections where none is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sniffer.errors import RunError, unbroken
from sniffer.reader.held import Held
from sniffer.reader.laws import ranges
from sniffer.storage.moments import read_moments
from sniffer.types import Moments


def moments_of(
    runs: Sequence[Held], layer: int, head: int, kind: str, bucket: int | None, section: str | None
) -> Moments:
    """Of all vectors of one head in some runs, of documents that no two of them share.

    Raises:
        RunError: no run has them, or a file cannot be read.
    """
    return merged([one for run in runs for one in _pieces(run, layer, head, kind)], bucket, section)


def merged(found: Sequence[tuple[int, str, Moments]], bucket: int | None, section: str | None) -> Moments:
    """Of one head, from those of each bucket and section.

    Raises:
        RunError: there are none of that bucket or section.
    """
    wanted = [(b, s, moments) for b, s, moments in found if (bucket is None or b == bucket)]
    if bucket is not None and not wanted:
        known = ", ".join(map(str, sorted({b for b, _, _ in found})))
        raise RunError(f"bucket {bucket} has no positions: these do: {known or 'none'}")
    if section is not None and not any(s == section for _, s, _ in wanted):
        known = ", ".join(repr(s) for s in sorted({s for _, s, _ in wanted}))
        raise RunError(f"section {section!r} was not counted apart, or has no positions: these were: {known or 'none'}")
    pieces = [moments for _, s, moments in wanted if section in (None, s)]
    if not pieces:
        raise RunError("no document has been counted: there are no moments")
    return Moments.merged(pieces)


def _pieces(run: Held, layer: int, head: int, kind: str) -> Iterator[tuple[int, str, Moments]]:
    if head not in (heads := run.counted_heads(layer, kind)):
        raise RunError(f"head {head} was not counted: layer {layer}, kind {kind} has heads {ranges(heads)}")
    layout, dim = run.manifest.moments_layout, run.manifest.layer(layer).dims[kind]
    assert layout is not None
    for record in run.manifest.moment_files:
        try:
            yield from read_moments(run.folder, record, layout, layer, kind, head, dim)
        except (OSError, ValueError) as error:
            way = f"`python -m sniffer.runs resume {run.folder}` counts again"
            raise RunError(f"{run.folder / record.path} {unbroken(error)}: {way}") from error
