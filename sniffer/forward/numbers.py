"""Layers and heads as a user writes them: numbers, ranges, lists of these, heads by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sniffer.errors import ConfigError

Heads = tuple[int, ...] | dict[int, tuple[int, ...]] | None
"""Query heads: of all layers, or by layer; None for all."""


def numbers(key: str, value: Any) -> tuple[int, ...] | None:
    """Numbers and ranges as a sorted tuple: 3, "0-7", "0:8", or a list of these; None stays None.

    Raises:
        ConfigError: anything else, a negative number, or nothing at all.
    """
    if value is None:
        return None
    items = value if isinstance(value, list | tuple) else [value]
    found = {number for item in items for number in _range(key, item)}
    if not found:
        raise ConfigError(f"{key}={value} names nothing: use null for all")
    return tuple(sorted(found))


def heads_of(key: str, value: Any) -> Heads:
    """Heads of all layers, as `numbers` has them, or by layer: {0: [1, 2], 5: 0-3}.

    Raises:
        ConfigError: as `numbers`; or a layer is no number from 0.
    """
    if not isinstance(value, Mapping):
        return numbers(key, value)
    found: dict[int, tuple[int, ...]] = {}
    for layer, heads in value.items():
        if not re.fullmatch(r"\d{1,9}", str(layer)) or (some := numbers(f"{key}.{layer}", heads)) is None:
            raise ConfigError(f"{key} has {layer!r}: {heads!r}: give heads by layer as in {{0: [1, 2], 5: 0-3}}")
        found[int(layer)] = some
    if not found:
        raise ConfigError(f"{key}={{}} names nothing: use null for all")
    return dict(sorted(found.items()))


def layers_of(heads: Mapping[int, Any], layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """Those that heads are named of, which may not be others than are asked for."""
    if layers is not None and set(layers) != heads.keys():
        raise ConfigError(
            f"capture.layers={list(layers)} and capture.heads, which names heads of layers {list(heads)}: leave "
            "capture.layers out, it follows from capture.heads"
        )
    return tuple(heads)


MOST = 1 << 20
"""Beyond any model's layers and heads; a range is written out as numbers."""


def _range(key: str, item: Any) -> Sequence[int]:
    if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
        return (item,)
    if isinstance(item, str) and (match := re.fullmatch(r"(\d{1,99})(?:([-:])(\d{1,99}))?", item)):
        first, last = int(match[1]), int(match[3] or match[1]) + (match[2] != ":")
        if last > MOST:
            raise ConfigError(f"{key} has {item!r}, and no model has so many: name the last one")
        if last <= first:
            raise ConfigError(f"{key} has {item!r}, which names nothing: give the lower end first, as in 0-7 or 0:8")
        return range(first, last)
    raise ConfigError(f"{key} has {item!r:.60}, which is neither a number from 0 nor a range such as 0-7 or 0:8")
