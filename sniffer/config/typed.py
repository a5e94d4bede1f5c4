"""What stands on the command line itself, as against what a file, a sweep's parameters or a saved run say.

Trust is given by typing: a file that asks to be trusted is none the more trustworthy for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException


def is_typed(words: Sequence[str], key: str) -> bool:
    """Whether the words give `key` a value: key=..., +key=... or ++key=...."""
    return bool(_that_give(words, key))


def typed_strings(words: Sequence[str], key: str) -> list[str]:
    """Every string that the words give to `key`: one, a list's, or those that are swept over."""
    found: list[str] = []
    for word in _that_give(words, key):
        # What Hydra cannot read, it says itself.
        with suppress(HydraException):
            found += _strings(OverridesParser.create().parse_override(word).value())
    return found


def _that_give(words: Sequence[str], key: str) -> list[str]:
    return [word for word in words if re.match(rf"\+{{0,2}}{re.escape(key)}=", word)]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, QuotedString):
        yield value.text
    elif isinstance(value, str):
        yield value
    elif isinstance(value, list | ChoiceSweep):
        for inner in value if isinstance(value, list) else value.list:
            yield from _strings(inner)
