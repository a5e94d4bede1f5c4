"""Small files that anyone may have written, such as those of a run folder: read in bounded time, depth and memory.

A reader here opens plain files only (a FIFO would make it wait, a device would never end), takes no more bytes than the
kind of file can have, and of YAML no more than plain values: aliases, which let a kilobyte stand for terabytes, are not
among what this project writes. What is refused is a ValueError of a few words, for whoever knows the file's purpose.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from sniffer.storage.remote import RemotePath

CONFIG_BYTES = 1 << 18
"""More than any configuration: they have a kilobyte or two. PyYAML takes seconds for as many bytes as this."""

MANIFEST_BYTES = 1 << 28
"""Of a run of some hundred thousand parts."""

DEPTH = 64
"""Levels of lists and mappings within each other."""

NUMBER_LENGTH = 1000
"""Characters of a number: some notations of YAML take time that grows with the square."""


def read_text(path: Path, most: int = CONFIG_BYTES) -> str:
    """The text of a plain file of at most `most` bytes.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no plain file, too large, or not UTF-8.
    """
    if isinstance(path, RemotePath):
        if (n_bytes := path.stat().st_size) > most:
            raise ValueError(TOO_LARGE.format(n_bytes, most))
        return path.read_bytes().decode("utf-8")
    # Whoever opens a FIFO would wait for someone to write into it.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no plain file")
        if found.st_size > most:
            raise ValueError(TOO_LARGE.format(found.st_size, most))
        return file.read(most).decode("utf-8")


TOO_LARGE = "it has {:,} bytes, more than the {:,} that such a file can have"


def read_json(path: Path, most: int = MANIFEST_BYTES) -> Any:
    """The values of a JSON file.

    Raises:
        OSError, ValueError: as `read_text`; or it is not JSON, or nested deeper than any value of ours.
    """
    text = read_text(path, most)
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if _is_deep(values):
        raise ValueError(TOO_DEEP)
    return _whole(values, text)


def read_yaml(path: Path, most: int = CONFIG_BYTES) -> Any:
    """The plain values of a YAML file.

    Raises:
        OSError, ValueError, yaml.YAMLError: as `read_text` and `plain_yaml`.
    """
    return plain_yaml(read_text(path, most))


def plain_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError, yaml.YAMLError: it is not YAML, has an alias, or is nested deeper than any value of ours.
    """
    return _whole(yaml.load(text, PlainLoader), text)


TOO_DEEP = f"it is nested more than {DEPTH} levels deep"


def _is_deep(values: Any) -> bool:
    """Whether values of JSON lie deeper than DEPTH within each other."""
    level = [values] if isinstance(values, dict | list) else []
    for _ in range(DEPTH):
        below = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        level = [inner for inner in below if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _whole(values: Any, text: str) -> Any:
    """The same values; half a character, which an escape can stand for, could be neither shown nor saved."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(values, ensure_ascii=False, default=str, skipkeys=True).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half a character in a text (one of two surrogates)") from error
    return values


class PlainLoader(yaml.SafeLoader):
    """A SafeLoader for plain values: no aliases, no tags, no depth without end."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias (*), which no file of ours has")
        if getattr(self.peek_event(), "tag", None) is not None:
            raise ValueError(f"it has the tag {self.peek_event().tag!r:.60}, which no file of ours has")
        if self.depth >= DEPTH:
            raise ValueError(TOO_DEEP)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def number(self, node: yaml.ScalarNode) -> Any:
        if len(node.value) > NUMBER_LENGTH:
            raise ValueError(f"it has a number of {len(node.value):,} characters")
        read = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        return read(node)


for kind in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{kind}", PlainLoader.number)
