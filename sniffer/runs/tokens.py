"""The token ids that a run keeps: those of its documents, and the ones that its rows say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sniffer.errors import unbroken
from sniffer.storage.integrity import damage
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import Example
from sniffer.storage.tokens import TokenTable, read_tokens
from sniffer.types import Rows


def check_tokens(folder: Path, manifest: Manifest, examples: Mapping[int, Example]) -> tuple[TokenTable, list[str]]:
    """The token ids of all documents, none where they cannot be trusted; and what is wrong, one line each."""
    nothing = read_tokens(folder, ())
    problems = [f"{record.path}: {wrong}" for record in manifest.tokens if (wrong := damage(folder, record))]
    if problems:
        return nothing, problems
    try:
        table = read_tokens(folder, manifest.tokens)
    except (OSError, ValueError) as error:
        return nothing, [f"{RunFolder.TOKENS}: {unbroken(error)}"]
    return table, [*_told(manifest, table.lengths, examples), *_written(table, examples)]


def _told(manifest: Manifest, lengths: Mapping[int, int], examples: Mapping[int, Example]) -> Iterator[str]:
    where = RunFolder.TOKENS
    if unknown := sorted(lengths.keys() - examples.keys()):
        yield f"{where}: token ids of document {unknown[0]}, which examples.parquet does not list ({len(unknown)} such)"
    if lost := sorted(examples.keys() - lengths.keys() if _wanted(manifest) else ()):
        yield f"{where}: no token ids of document {lost[0]} ({len(lost)} such)"
    for number in sorted(lengths.keys() & examples.keys()):
        if lengths[number] != examples[number].n_tokens:
            n_tokens = examples[number].n_tokens
            yield f"{where}: {lengths[number]:,} token ids of document {number}, which has {n_tokens:,} tokens"


def _written(table: TokenTable, examples: Mapping[int, Example]) -> Iterator[str]:
    """Of what a model has written, both files say the same."""
    written = ((number, example.generated) for number, example in sorted(examples.items()))
    for number, generated in written:
        ids = table.of(number)
        if generated is None or ids is None:
            continue
        if not np.array_equal(ids[len(ids) - len(generated) :], generated.token_ids):
            yield f"{RunFolder.TOKENS}: document {number} does not end with the tokens that were generated"


def _wanted(manifest: Manifest) -> bool:
    """Whether every document is to have its token ids: in runs of early releases none has."""
    output = manifest.config.get("output")
    return manifest.status == "complete" and isinstance(output, Mapping) and output.get("tokens") is True


def check_rows(table: TokenTable, layer: int, kind: str, rows: Rows) -> Iterator[str]:
    """What is wrong with the tokens that the rows of one (layer, kind) say, one line."""
    wrong = np.flatnonzero(table.disagree(rows.example_id, rows.position, rows.token_id))
    if len(wrong):
        first = wrong[0]
        yield (
            f"layer {layer}, kind {kind}: {len(wrong):,} rows say another token than their document has there, first "
            f"position {rows.position[first]} of document {rows.example_id[first]}"
        )
