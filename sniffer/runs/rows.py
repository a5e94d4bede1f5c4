"""Reading every row of a part, and checking all that the file and the manifest say of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sniffer.errors import first_line
from sniffer.reader.scan import contents_of, part_file, require_part
from sniffer.storage.digest import Digest, digest_rows, sum_rows
from sniffer.storage.finite import NotFinite, count_not_finite
from sniffer.storage.manifest import Manifest
from sniffer.storage.parquet import parquet
from sniffer.storage.schema import Footer, Part, from_arrow, row_schema
from sniffer.storage.writer import rows_per_section
from sniffer.types import Column, Rows


def check_part(folder: Path, manifest: Manifest, part: Part) -> tuple[Rows, list[str]]:
    """Reads a whole part.

    Returns:
        Where one head's rows are from, and what is wrong with the file, one line each.
    """
    problems: list[str] = []
    dim = manifest.layer(part.layer).dims[part.kind]
    try:
        file = parquet(folder / part.path)
        columns = manifest.columns(part.layer, part.kind)
        if not file.schema_arrow.remove_metadata().equals(row_schema(columns, manifest.has_sections)):
            return Rows.joined([]), [f"{part.path}: does not have the columns of a part"]
        require_part(contents_of(file), part.bytes, dim, part.rows)
        problems += _footer(file.schema_arrow, manifest, part, dim)
        with part_file(folder / part.path, manifest.has_sections, file.metadata) as read:
            heads, digest, not_finite = _heads(read, part, columns)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return Rows.joined([]), [f"{part.path}: cannot be read ({first_line(error)})"]
    wanted = manifest.selection[part.layer][part.kind]
    first = next(iter(heads.values()), Rows.joined([]))
    if heads and tuple(heads) != tuple(wanted):
        problems.append(f"{part.path}: has heads {list(heads)}, not {list(wanted)}")
    if not all(rows.same(first) for rows in heads.values()):
        problems.append(f"{part.path}: its heads do not have the same positions")
    if not first.in_part_order:
        problems.append(f"{part.path}: its rows are not in order, or some are there twice")
    if sum(map(len, heads.values())) != part.rows:
        problems.append(f"{part.path}: has {sum(map(len, heads.values())):,} rows, the manifest says {part.rows:,}")
    buckets = dict(zip(*(column.tolist() for column in np.unique(first.bucket, return_counts=True)), strict=True))
    if {bucket: rows * len(heads) for bucket, rows in buckets.items()} != dict(part.buckets):
        problems.append(f"{part.path}: its rows per bucket are not those of the manifest")
    # Of no rows nothing tells whether they have sections.
    sections = rows_per_section(first, len(heads)) if len(first) or not manifest.has_sections else {}
    if sections != part.sections:
        problems.append(f"{part.path}: its rows per section are not those of the manifest")
    if str(digest) != part.digest:
        problems.append(f"{part.path}: its rows have the digest {digest}, the manifest says {part.digest}")
    if part.not_finite is not None and part.not_finite != not_finite:
        problems.append(f"{part.path}: its rows that are not finite: {not_finite}; the manifest says {part.not_finite}")
    return first, problems


def _heads(file: pq.ParquetFile, part: Part, columns: Sequence[Column]) -> tuple[dict[int, Rows], Digest, NotFinite]:
    """Where each head's rows are from, in the file's order, the digest of all rows, and those that are not finite."""
    pieces: dict[int, list[Rows]] = {}
    digest, not_finite = Digest(), NotFinite()
    for number in range(file.metadata.num_row_groups):
        table = file.read_row_group(number).combine_chunks()
        head = _only(table["head"].to_numpy())
        rows = Rows.from_columns(table)
        floats = from_arrow(columns, table)
        digest += digest_rows(part.layer, part.kind, head, sum_rows(rows), floats)
        not_finite += count_not_finite(floats)
        pieces.setdefault(head, []).append(rows)
    return {head: Rows.joined(found) for head, found in pieces.items()}, digest, not_finite


def _only(heads: np.ndarray) -> int:
    found = np.unique(heads)
    if len(found) != 1:
        raise ValueError(f"a row group holds heads {found.tolist()}, not one")
    return int(found[0])


def _footer(schema: pa.Schema, manifest: Manifest, part: Part, dim: int) -> list[str]:
    footer = Footer.decode(schema.metadata)
    wanted = {
        "layer": part.layer,
        "kind": part.kind,
        "dim": dim,
        "seed": manifest.seed,
        "sampler": manifest.sampler_fields,
    }
    found = {name: getattr(footer, name) for name in wanted}
    return [
        f"{part.path}: its footer says {name}={found[name]}, the manifest {value}"
        for name, value in wanted.items()
        if found[name] != value
    ]
