"""Columns of a table by name, or by a path into one that is nested: `doc.body`, `messages.0.content`.

A column that has the whole path as its name is that column. Else the path's first part names the column, and the others
the fields and the places in lists from there on; -1 is the last place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sniffer.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa


def column_of(path: str, columns: Sequence[str], place: str) -> str:
    """The column that a path begins in.

    Raises:
        DatasetError: there is none, or more than one of its name.
    """
    column = path if path in columns else path.split(".")[0]
    if column not in columns:
        raise DatasetError(
            f"{place} has no column {path!r}, only {', '.join(columns)}: name one of these, such as with "
            "dataset.text_column"
        )
    if (count := columns.count(column)) > 1:
        raise DatasetError(f"{place} has {count} columns {column!r}, and which is meant is unknown: rename one")
    return column


def steps_of(path: str, column: str) -> list[str]:
    """What a path says beyond its column."""
    return [] if path == column else path.split(".")[1:]


def value_at(value: Any, path: str, column: str, place: str) -> Any:
    """What a path means, given the value of its column in one row; null where something on the way is null.

    Raises:
        DatasetError: naming how far it leads.
    """
    led = column
    for step in steps_of(path, column):
        if value is None:
            return None
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and _is_place(step, value):
            value = value[int(step)]
        else:
            raise DatasetError(f"{place}: the path {path!r} ends at {led!r}, {_told(value)} without {step!r}")
        led = f"{led}.{step}"
    return value


def _is_place(step: str, values: list[Any]) -> bool:
    return step.removeprefix("-").isdecimal() and -len(values) <= int(step) < len(values)


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"an object of {', '.join(map(str, value)) or 'nothing'}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"


def type_at(schema: pa.Schema, path: str, place: str) -> pa.DataType:
    """The type of what a path means in an Arrow table.

    Raises:
        DatasetError: naming how far it leads.
    """
    import pyarrow as pa

    column = column_of(path, schema.names, place)
    found, led = schema.field(column).type, column
    for step in steps_of(path, column):
        if pa.types.is_struct(found) and found.get_field_index(step) >= 0:
            found = found.field(step).type
        elif hasattr(found, "value_type") and step.removeprefix("-").isdecimal():
            found = found.value_type
        else:
            raise DatasetError(f"{place}: the path {path!r} ends at {led!r}, of type {found}, without {step!r}")
        led = f"{led}.{step}"
    return found


def needed(schema: pa.Schema, path: str, column: str) -> str:
    """The part of an Arrow column to be read for a path: a struct's fields lie apart, a list's items do not."""
    import pyarrow as pa

    found, led = schema.field(column).type, [column]
    for step in steps_of(path, column):
        if not pa.types.is_struct(found):
            break
        found = found.field(step).type
        led.append(step)
    return ".".join(led)


def require_text(schema: pa.Schema, path: str, place: str) -> None:
    """Raises DatasetError where what a path means is not text."""
    if "string" not in (name := str(type_at(schema, path, place))) or name.startswith(("list", "struct", "map")):
        raise DatasetError(f"{place}: the column {path!r} is of type {name}, not text: set dataset.text_column")
