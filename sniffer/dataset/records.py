"""JSON: records one a line, or in one array, each with its place for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sniffer.dataset.compressed import lines, read_text, unreadable


class Ambiguous(dict[str, Any]):
    """A JSON object that has some of its keys again: those in `twice`, of which a dict keeps the last value."""

    twice: Sequence[str] = ()


def keys_of(record: dict[str, Any]) -> list[str]:
    """An object's keys, as often as it has them."""
    return [*record, *getattr(record, "twice", ())]


def records_of_lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """One object a line, with its place; blank lines do not count.

    Raises:
        UnreadableError: a line is no JSON object.
    """
    for number, line in enumerate(lines(file), start=1):
        if line.strip():
            place = f"{file} line {number}"
            yield _require_object(_parsed(line, place), place, "one object per line (of an array: dataset=json)"), place


def records_of_array(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file that is one array, with their places; it is in memory as a whole.

    Raises:
        UnreadableError: it is no array of objects.
    """
    values = _parsed(read_text(file), str(file))
    if not isinstance(values, list):
        raise unreadable(f"{file} holds a JSON {type(values).__name__}: wanted an array of objects")
    for number, value in enumerate(values):
        place = f"{file} element {number}"
        yield _require_object(value, place, "objects in the array"), place


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    ambiguous, keys = Ambiguous(record), [key for key, _ in pairs]
    ambiguous.twice = [key for place, key in enumerate(keys) if key in keys[:place]]
    return ambiguous


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _parsed(text: str, place: str) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        more = (
            " (objects one per line are dataset=jsonl)" if "Extra data" in str(error) and " line " not in place else ""
        )
        raise unreadable(f"{place} is not JSON: {error}{more}") from error


def _require_object(value: Any, place: str, wanted: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise unreadable(f"{place} holds a JSON {type(value).__name__}: wanted {wanted}")
    return value
