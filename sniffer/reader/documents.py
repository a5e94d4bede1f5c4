"""The documents of a run, as its examples.parquet lists them, and the sections that they have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from sniffer.errors import RunError, unbroken
from sniffer.storage.example_sections import tokens_by_section
from sniffer.storage.examples import examples_table
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.types import NONE

SHOWN = 12
"""Sections that an error names."""


def documents_of(folder: Path, manifest: Manifest) -> pa.Table:
    """The table of documents; RunError where there is none yet, or it cannot be read.

    While a run goes on, or its copy is brought over, it is the file or its twin that fits the manifest.
    """
    if manifest.examples is None:
        raise RunError(f"{folder} has no examples yet: the run was stopped before its first commit")
    path = folder / manifest.examples.path
    try:
        return examples_table(path, manifest.examples)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            return examples_table(folder / RunFolder.EXAMPLES_TWIN, manifest.examples)
        reason = unbroken(error)
        raise RunError(f"could not read {path}: {reason}; `python -m sniffer.runs verify` tells more") from error


def sections_of(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """The sections that documents have, by name."""
    return tuple(tokens_by_section(documents_of(folder, manifest))) if manifest.has_sections else ()


def chosen_sections(folder: Path, manifest: Manifest, wanted: Iterable[str], there: Sequence[str]) -> tuple[str, ...]:
    """Some sections, each once.

    Raises:
        RunError: the run has no sections, or not one of these.
    """
    chosen = tuple(dict.fromkeys(wanted))
    if not manifest.has_sections:
        raise RunError(f"{folder} has no sections: capture with some (docs/text.md), or leave sections out")
    for name in chosen:
        if name != NONE and name not in there:
            raise RunError(f"section {name!r} is in no document: {folder} has {_listed(there)}")
    return chosen


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(map(repr, names[:SHOWN])) or 'none'}{more}"
