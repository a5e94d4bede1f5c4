"""Sections that a sampler keeps whole, by `sampler.keep_sections`: whether documents have them, told early."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from sniffer.dataset.feed import Chunk
from sniffer.dataset.source import Shard
from sniffer.errors import ConfigError
from sniffer.types import NONE, Dataset, Sections, has_sections

SHOWN = 12
"""Sections that an error names."""


def check_kept(kept: Sequence[str], dataset: Dataset, *, generates: bool = False) -> None:
    """Raises ConfigError where sections are to be kept, and no document of the dataset has any."""
    if kept and not has_sections(dataset, generates=generates):
        raise ConfigError(
            f"sampler.keep_sections={list(kept)}: documents of this dataset have no sections, which come with chats, a "
            "list as dataset.text_column, dataset.spans_column, .labels_column or .pack_to, and with dataset=niah"
        )


def require_kept(kept: Sequence[str], dataset: Dataset, first: Chunk, to_come: Collection[str] = ()) -> None:
    """Raises ConfigError where all documents are read, and none has a section that is to be kept, nor will have it.

    A shard may well have none.
    """
    kept = [name for name in kept if name not in to_come]
    lacking, known = _lacking(kept, (document.sections for document in first.documents))
    known |= {*to_come}
    if lacking and first.last and getattr(dataset, "shard", Shard()).count == 1:
        there = ", ".join(map(repr, sorted(known)[:SHOWN])) or "none"
        raise ConfigError(f"sampler.keep_sections names {lacking[0]!r}, a section of no document: there are {there}")


def unkept(kept: Sequence[str], documents: Iterable[Sections | None]) -> Iterator[str]:
    """What to say at the end of sections that were to be kept, and that no document has had."""
    lacking, known = _lacking(kept, documents)
    for name in lacking:
        yield f"sampler.keep_sections names {name!r}, and no document here has that section; there are {len(known):,}"


def _lacking(kept: Sequence[str], documents: Iterable[Sections | None]) -> tuple[list[str], set[str]]:
    """Those of `kept` that no document has, and all that some have."""
    if not kept:
        return [], set()
    known = {name for sections in documents if sections is not None for name in sections.known} - {NONE}
    return [name for name in kept if name not in known], known
