"""Values that fit their annotations pass, others are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from sniffer.storage.well_formed import misfits


@dataclass(frozen=True)
class Point:
    x: float
    name: str | None


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, int),
        (1, float),
        (None, int | None),
        ("x", Any),
        ({1: ("a", "b")}, Mapping[int, tuple[str, ...]]),
        ((Point(1, None), Point(0.5, "a")), tuple[Point, ...]),
    ],
)
def test_what_fits(value: Any, hint: Any):
    assert list(misfits(value, hint, "it")) == []


@pytest.mark.parametrize(
    ("value", "hint", "named"),
    [
        (True, int, "it is True, not a whole number"),
        (1.5, int, "it is 1.5, not a whole number"),
        ("1", float | None, "it is '1', not a number"),
        ([], Mapping[str, int], "it is [], not a mapping"),
        ({"a": None}, Mapping[str, int], "it.a is None, not a whole number"),
        ({"a": 1}, Mapping[int, int], "a key of it is 'a', not a whole number"),
        ((1, "b"), tuple[int, ...], "it[1] is 'b', not a whole number"),
        (Point("x", None), Point, "it.x is 'x', not a number"),  # type: ignore[arg-type]
        (Point(1, 2), Point | None, "it.name is 2, not text"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_named(value: Any, hint: Any, named: str):
    assert list(misfits(value, hint, "it")) == [named]
