"""Whether values read from JSON are what a dataclass's annotations say, to be trusted from there on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints


def misfits(value: Any, hint: Any, name: str) -> Iterator[str]:
    """What does not fit, one phrase each.

    Args:
        value: the value, dataclasses already built.
        hint: its annotation: a class, Any, a union, a Mapping, a tuple of one kind, or a dataclass.
        name: what to call it.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if origin is UnionType:
        if all(any(misfits(value, option, name)) for option in inner):
            yield from misfits(value, next(option for option in inner if option is not NoneType), name)
    elif not _is_a(value, origin or hint):
        yield f"{name} is {value!r:.40}, not {_called(origin or hint)}"
    elif origin is tuple:
        for number, one in enumerate(value):
            yield from misfits(one, inner[0], f"{name}[{number}]")
    elif origin is Mapping:
        for key, one in value.items():
            yield from misfits(key, inner[0], f"a key of {name}")
            yield from misfits(one, inner[1], f"{name}.{key}")
    elif is_dataclass(value):
        kind: Any = type(value)
        for field in fields(value):
            yield from misfits(getattr(value, field.name), _hints(kind)[field.name], f"{name}.{field.name}".lstrip("."))


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _called(kind: type) -> str:
    names = {Mapping: "a mapping", tuple: "a list", str: "text", int: "a whole number", float: "a number"}
    return names.get(kind, kind.__name__)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
