"""Which documents the parts on disk hold.

A document goes through the model in one batch, and its rows of a (layer, kind) reach the disk in one part. So two
parts of a (layer, kind) that have a document in common may hold rows twice, and only those need be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from sniffer.errors import RunError, unbroken
from sniffer.storage.parquet import parquet
from sniffer.storage.schema import Part


def examples_by_pair(folder: Path, parts: Iterable[Part]) -> dict[tuple[int, str], frozenset[int]]:
    """The example ids in some parts, by (layer, kind)."""
    ids: dict[tuple[int, str], set[int]] = defaultdict(set)
    for part in parts:
        ids[part.layer, part.kind].update(example_ids(folder, part).tolist())
    return {pair: frozenset(found) for pair, found in ids.items()}


def repeated(folder: Path, parts: Iterable[Part]) -> Iterator[tuple[Part, Part]]:
    """Parts that hold a row of another part of their (layer, kind), each with that other part.

    Of two, the one with fewer rows is named first, and can be done without: all those that are never
    named first have no row in common.

    Raises:
        RunError: one cannot be read.
    """
    by_pair: dict[tuple[int, str], list[Part]] = defaultdict(list)
    for part in parts:
        by_pair[part.layer, part.kind].append(part)
    for same in by_pair.values():
        if len(same) > 1 and _common([example_ids(folder, part) for part in same]):
            yield from _repeated(folder, same)


def _repeated(folder: Path, parts: list[Part]) -> Iterator[tuple[Part, Part]]:
    """Of the parts of one (layer, kind)."""
    kept: list[tuple[Part, np.ndarray]] = []
    for part in sorted(parts, key=lambda part: -part.rows):
        rows = _rows(folder, part)
        others = [other for other, theirs in kept if _common([rows, theirs])]
        yield from ((part, other) for other in others)
        if not others:
            kept.append((part, rows))


def _common(sets: Sequence[np.ndarray]) -> bool:
    """Whether some value is in two of them; each has it once."""
    together = np.concatenate(sets)
    return len(np.unique(together)) < len(together)


def refuse_repeated(folder: Path, parts: Iterable[Part]) -> None:
    """Keeps rows that are there twice from being handed on.

    Raises:
        RunError: naming two parts that hold the same document.
    """
    for part, other in repeated(folder, parts):
        raise RunError(
            f"{part.path} has rows that {other.path} has too: `python -m sniffer.runs resume {folder}` mends it"
        )


def example_ids(folder: Path, part: Part) -> Int64[np.ndarray, " _"]:
    """The documents of a part, each once.

    Raises:
        RunError: it cannot be read.
    """
    ids: Int64[np.ndarray, " _"] = np.unique(_columns(folder, part, ["example_id"])["example_id"].to_numpy())
    return ids


def _rows(folder: Path, part: Part) -> np.ndarray:
    """Where a part's rows are from, as one value each, (example_id, position)."""
    table = _columns(folder, part, ["example_id", "position"])
    places = np.stack([table[name].to_numpy().astype(np.int64) for name in table.column_names], axis=1)
    return np.unique(np.ascontiguousarray(places).view([("example_id", "i8"), ("position", "i8")]))


def _columns(folder: Path, part: Part, names: list[str]) -> pa.Table:
    """Columns that all heads of a part share: the row groups of its first head have them.

    Raises:
        RunError: it cannot be read.
    """
    try:
        file = parquet(folder / part.path)
        _require_columns(file, part, names)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        heads = [group.column(0).statistics.min for group in groups]
        return file.read_row_groups([n for n, head in enumerate(heads) if head == heads[0]], columns=names)
    except (OSError, AttributeError, KeyError, pa.ArrowException) as error:
        raise RunError(
            f"could not read {folder / part.path}: {unbroken(error)}; python -m sniffer.runs verify {folder} tells more"
        ) from error


def _require_columns(file: pq.ParquetFile, part: Part, names: list[str]) -> None:
    """Raises pyarrow.ArrowInvalid where a small file stands for more than the manifest says, or for other columns."""
    if file.metadata.num_rows != part.rows:
        raise pa.ArrowInvalid(f"it has {file.metadata.num_rows:,} rows, the manifest says {part.rows:,}")
    for name in names:
        if not pa.types.is_integer(found := file.schema_arrow.field(name).type):
            raise pa.ArrowInvalid(f"its column {name} is of the type {found}, not one of whole numbers")
