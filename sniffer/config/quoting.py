"""Words of the command line that Hydra cannot read, told before it tries: which one, and how to write it.

Hydra has a grammar for values, in which = ( ) [ ] { } , and more mean something; a value that has them as plain text
goes into quotes of Hydra's, within those of the shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from sniffer.errors import ConfigError

HARMLESS = re.compile(r"[^\"$`\\!]*")
"""What the shell leaves alone within double quotes."""

CLOSING = {"[": "]", "{": "}"}


def refuse_unreadable(words: Sequence[str], *, sweep: bool) -> None:
    """Raises ConfigError for the first word that Hydra could not read, or, without a sweep, not as one value."""
    sweep = sweep or any(word.startswith("hydra.mode=") for word in words)
    for word in words:
        try:
            read = OverridesParser.create().parse_override(word)
        except HydraException:
            raise ConfigError(_unreadable(word)) from None
        if read.is_sweep_override() and not sweep:
            raise ConfigError(_several(word))


def _unreadable(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word!r} is no KEY=VALUE: write, for instance, sampler.base_rate=2 (an option begins with --)"
    closing = CLOSING.get(value[:1])
    if closing and value.count(value[0]) > value.count(closing):
        return f"{word} has no end: close it with {closing}, and put the whole in quotes: {shlex.quote(word + closing)}"
    quoted = as_text(key, value)
    if quoted is None:
        return f"{word} cannot be read: its value has characters that mean something to Hydra; put it in a YAML file"
    return f"{word} cannot be read: as plain text its value goes into quotes within quotes: {quoted}"


def _several(word: str) -> str:
    key, _, value = word.partition("=")
    listed, text = shlex.quote(f"{key}=[{value}]"), as_text(key, value)
    one = f", for one text {text}" if text is not None else ""
    return f"{word} gives several values: for a list write {listed}{one}, for a run of each add -m"


def as_text(key: str, value: str) -> str | None:
    """How to type a value that is plain text; None where Hydra would not read it back as it is."""
    for mark in ("'", '"') if "'" not in value else ('"', "'"):
        word = f"{key}={mark}{value.replace(mark, chr(92) + mark)}{mark}"
        try:
            read: Override = OverridesParser.create().parse_override(word)
        except HydraException:
            continue
        if not read.is_sweep_override() and read.value() == value and isinstance(read.value(), str):
            return f'"{word}"' if HARMLESS.fullmatch(word) else shlex.quote(word)
    return None
