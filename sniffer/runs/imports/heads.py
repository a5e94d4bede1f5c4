"""Files of one layer, head and kind, such as l07h03q/data.parquet: found, and read within bounds.

Columns are bucket, example_id, position, vector, sliding_window (null where a layer attends to everything), as
github.com/viktor-shcherb/qk-sniffer wrote them and `runs export` does; section where there are sections. Rows may
come in any order. Others, such as token_str, are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32

from sniffer.errors import RunError, first_line
from sniffer.storage.bounds import MOST, stands_for_too_much
from sniffer.types import KINDS, ROW_DTYPES, SECTION, UNKNOWN_TOKEN, Names, Rows

NAME = re.compile(rf"l(\d{{1,5}})h(\d{{1,5}})({'|'.join(KINDS)})")
LIKE = re.compile(r"l\d+h\d+\w*")
DATA = "data.parquet"
NUMBERS = ("bucket", "example_id", "position")
WANTED = (*NUMBERS, "vector", "sliding_window")
PRE = {"q": "q_pre", "k": "k_pre"}
SHOWN = 5


@dataclass(frozen=True)
class HeadFile:
    """A file with the vectors of one head."""

    layer: int
    head: int
    kind: str
    path: Path

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class HeadRows:
    """What a file holds beside its vectors, in the order of a part. `order` brings the file's rows into that."""

    rows: Rows
    order: np.ndarray
    window: int | None


def head_files(folder: Path, *, pre: bool = False) -> list[HeadFile]:
    """The files of a folder, by layer, kind and head.

    Args:
        pre: q and k there are from before RoPE.

    Raises:
        RunError: it is not of that layout, or lacks a file.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder: give one that holds folders such as l00h00q")
    named = sorted(one for one in folder.iterdir() if one.is_dir() and LIKE.fullmatch(one.name))
    if not named:
        raise RunError(f"{folder} holds no folder such as l00h00q with a {DATA} in it{_below(folder)}")
    found: dict[tuple[int, str, int], HeadFile] = {}
    for one in named:
        file = _head_file(one, pre)
        key = file.layer, file.kind, file.head
        if (other := found.setdefault(key, file)) is not file:
            raise RunError(f"{folder} has {other.name} and {file.name}, of the same layer, head and kind: remove one")
    return [found[key] for key in sorted(found, key=lambda key: (key[0], KINDS.index(key[1]), key[2]))]


def _head_file(place: Path, pre: bool) -> HeadFile:
    parts = NAME.fullmatch(place.name)
    if parts is None:
        raise RunError(f"{place} is no layer, head and kind that are known: names are l00h00 and {', '.join(KINDS)}")
    layer, head, kind = int(parts[1]), int(parts[2]), parts[3]
    if layer > MOST["layer"] or head > MOST["head"]:
        raise RunError(f"{place.name} is beyond the {MOST['layer']:,} layers and heads that a run can have")
    if pre and kind in PRE.values():
        raise RunError(f"{place.name} says itself that it is from before RoPE: leave --pre out")
    path = place / DATA
    if not path.is_file():
        others = ", ".join(sorted(one.name for one in place.iterdir())[:SHOWN]) or "nothing"
        raise RunError(f"{place} has no {DATA} but {others}: download it whole, or remove the folder")
    return HeadFile(layer, head, PRE.get(kind, kind) if pre else kind, path)


def _below(folder: Path) -> str:
    """Where such folders lie further down, as data/MODEL had them."""
    for depth in ("*", "*/*"):
        places = {one.parent for one in folder.glob(f"{depth}/l*h*") if NAME.fullmatch(one.name)}
        if places:
            return f"; {', '.join(map(str, sorted(places)[:SHOWN]))} does: give that"
    return ""


def read_rows(file: HeadFile) -> HeadRows:
    """All but the vectors.

    Raises:
        RunError: in one line, what is wrong with the file.
    """
    table = _table(file, [*NUMBERS, "sliding_window", SECTION])
    values = {name: _integers(file, table, name) for name in NUMBERS}
    for name in ("bucket", "position"):
        if len(table) and not 0 <= values[name].min() <= values[name].max() <= MOST[name]:
            raise _wrong(file, f"has a {name} that is not from 0 to {MOST[name]:,}")
    values["token_id"] = np.full(len(table), UNKNOWN_TOKEN)
    section = Names.from_column(table[SECTION]) if SECTION in table.column_names else None
    rows = Rows(**{name: values[name].astype(dtype) for name, dtype in ROW_DTYPES.items()}, section=section)
    places = np.lexsort((rows.position, rows.example_id))
    again = (np.diff(rows.position[places]) == 0) & (np.diff(rows.example_id[places]) == 0)
    if again.any():
        first = places[int(np.argmax(again))]
        at = f"position {rows.position[first]} of example {rows.example_id[first]}"
        raise _wrong(file, f"has {int(again.sum()):,} rows twice, first {at}")
    order = rows.part_order
    return HeadRows(rows[order], order, _window(file, table))


def read_vectors(file: HeadFile, order: np.ndarray) -> Float32[np.ndarray, "rows dim"]:
    """The vectors, in the order of a part.

    Raises:
        RunError: they are not all of one length, or no numbers of 32 or 16 bits.
    """
    column = _table(file, ["vector"])["vector"].combine_chunks()
    wanted = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if not (wanted or pa.types.is_fixed_size_list(column.type)) or not _narrow(column.type.value_type):
        raise _wrong(file, f"has vectors of type {column.type}, not lists of float32 or float16")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1:
        raise _wrong(
            file, f"has vectors of {' and '.join(map(str, sorted(lengths)[:SHOWN]))} numbers: all must be alike"
        )
    numbers = column.flatten()
    if numbers.null_count:
        raise _wrong(file, "has vectors with a null in them")
    dim = lengths[0] if lengths else 0
    if lengths and not 0 < dim <= MOST["dim"]:
        raise _wrong(file, f"has vectors of {dim:,} numbers")
    found = numbers.to_numpy(zero_copy_only=False).reshape(len(column), dim)[order]
    return np.ascontiguousarray(found, dtype=np.float32)


def _narrow(kind: pa.DataType) -> bool:
    """Whether numbers are floats that float32 has exactly."""
    return bool(pa.types.is_float32(kind) or pa.types.is_float16(kind))


def _table(file: HeadFile, columns: Sequence[str]) -> pa.Table:
    try:
        with pq.ParquetFile(file.path) as opened:
            names, metadata = opened.schema_arrow.names, opened.metadata
            if missing := [name for name in WANTED if name not in names]:
                raise _wrong(file, f"has no column {', '.join(missing)} (it has {', '.join(names[:20])})")
            if stands_for_too_much(metadata.num_rows, file.path.stat().st_size):
                raise _wrong(file, f"has few bytes that stand for {metadata.num_rows:,} rows")
            table = opened.read([name for name in columns if name in names])
    except (OSError, pa.ArrowException) as error:
        raise _wrong(file, f"cannot be read ({first_line(error)})") from error
    for name in table.column_names:
        if name != "sliding_window" and table[name].null_count:
            raise _wrong(file, f"has a null in column {name}")
    return table


def _integers(file: HeadFile, table: pa.Table, name: str) -> np.ndarray:
    kind = table.schema.field(name).type
    if not pa.types.is_integer(kind) or pa.types.is_uint64(kind):
        raise _wrong(file, f"has a column {name} of {kind}, not of integers")
    found: np.ndarray = table[name].to_numpy().astype(np.int64)
    return found


def _window(file: HeadFile, table: pa.Table) -> int | None:
    found = pc.unique(table["sliding_window"]).to_pylist() or [None]
    if len(found) > 1 or not (found[0] is None or (isinstance(found[0], int) and found[0] > 0)):
        raise _wrong(file, f"has sliding windows {', '.join(map(str, found[:SHOWN]))}: a layer has one, or null")
    window: int | None = found[0]
    return window


def _wrong(file: HeadFile, what: str) -> RunError:
    return RunError(f"{file.path} {what}: nothing was imported")
