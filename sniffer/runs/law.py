"""The law of sampling, applied again: exactly these positions of these documents must be there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import polars as pl

from sniffer.sampler import Picker
from sniffer.storage.schema import Example
from sniffer.types import KIND, Document, Names, Rows


def check_law(picker: Picker, examples: Mapping[int, Example], layer: int, kind: str, found: Rows) -> Iterator[str]:
    """What is wrong with the rows of one (layer, kind), one line each, given the documents they are from."""
    where = f"layer {layer}, kind {kind}"
    unknown = sorted(set(found.example_id.tolist()) - examples.keys())
    if unknown:
        yield f"{where}: rows of document {unknown[0]}, which examples.parquet does not list ({len(unknown)} such)"
    n_tokens = np.array([examples[number].n_tokens if number in examples else 0 for number in found.example_id])
    if len(found) and not unknown and (found.position >= n_tokens).any():
        yield f"{where}: positions beyond the end of their document"
        return
    side = picker.side(KIND[kind].draw)
    if (about := _far_from(side, examples, len(found))) is not None:
        yield f"{where}: {len(found):,} positions, where the law keeps about {about:,.0f}"
        return
    expected = _expected(picker, examples, layer, kind)
    kept = _sorted(found.example_id, found.position)
    missing, extra = _without(expected, kept), _without(kept, expected)
    if len(missing):
        yield f"{where}: {len(missing):,} positions that the law keeps are missing, first {_named(missing, examples)}"
    if len(extra) and not unknown:
        yield f"{where}: {len(extra):,} positions that the law does not keep, first {_named(extra, examples)}"
    if len(np.unique(kept, axis=0)) != len(kept):
        yield f"{where}: some positions are there twice: resume leaves the second ones out"
    if len(found) and (side.buckets[found.position] != found.bucket).any():
        yield f"{where}: some rows do not have the bucket of their position"
    if found.section is not None and not unknown and not _names(examples, found).same(found.section):
        yield f"{where}: some rows do not have the section of their token"


MANY = 1 << 27
"""Tokens whose draws take so long that their number is looked at first."""


def _far_from(picker: Picker, examples: Mapping[int, Example], found: int) -> float | None:
    """The expected number of positions, where there are many tokens and `found` is ten deviations away from it."""
    lengths = [example.n_tokens for example in examples.values()]
    if sum(lengths) < MANY:
        return None
    about = picker.expected(lengths, [example.sections for example in examples.values()])
    about -= picker.expected([example.first_position for example in examples.values()])
    return about if abs(found - about) > 10 * (1 + about**0.5) else None


def _expected(picker: Picker, examples: Mapping[int, Example], layer: int, kind: str) -> np.ndarray:
    """(example_id, position) of all that the draw keeps, sorted."""
    ids, positions = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for example in examples.values():
        # Only its length and its id matter to a draw, which is the same wherever its rows begin.
        tokens = np.broadcast_to(np.int32(0), example.n_tokens)
        known = example.example_id, example.source_id, tokens, example.truncated
        document = Document(*known, sections=example.sections)
        kept = picker.positions(document, layer, KIND[kind].draw)
        positions.append(kept[kept >= example.first_position])
        ids.append(np.full(len(positions[-1]), example.example_id, dtype=np.int64))
    return _sorted(np.concatenate(ids), np.concatenate(positions))


def _names(examples: Mapping[int, Example], found: Rows) -> Names:
    """The sections at some positions, as examples.parquet has them."""
    order = np.argsort(found.example_id, kind="stable")
    ids, starts = np.unique(found.example_id[order], return_index=True)
    pieces = []
    for number, rows in zip(ids.tolist(), np.split(order, starts[1:]), strict=True) if len(ids) else ():
        sections = examples[number].sections
        pieces.append(Names.none(len(rows)) if sections is None else sections.at(found.position[rows]))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Names.joined(pieces)[back]


def _sorted(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    order = np.lexsort((positions, ids))
    return np.stack([ids[order], positions[order].astype(np.int64)], axis=1)


def _without(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The pairs of `some` that are not among `others`."""
    if np.array_equal(some, others):
        return some[:0]
    schema = {"example_id": pl.Int64, "position": pl.Int64}
    frames = (pl.DataFrame(pairs, schema, orient="row") for pairs in (some, others))
    left = next(frames).join(next(frames), on=list(schema), how="anti", maintain_order="left")
    return left.to_numpy().reshape(-1, 2)


def _named(pairs: np.ndarray, examples: Mapping[int, Example]) -> str:
    number, position = pairs[0].tolist()
    name = examples[number].source_id if number in examples else number
    return f"{position} of document {name!r}"
