"""What follows from the parts that a manifest names: rows by kind, bucket and section, digests, what is not finite."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from sniffer.sampler import SIDES
from sniffer.storage.digest import combine
from sniffer.storage.finite import NotFinite
from sniffer.storage.law import has_sides
from sniffer.storage.schema import SECTIONS, Part
from sniffer.types import KIND


class Counted:
    """Something that names parts, of these heads by layer and kind."""

    parts: tuple[Part, ...]
    selection: Mapping[int, Mapping[str, tuple[int, ...]]]
    dataset: Mapping[str, Any]
    sampler: Mapping[str, Any]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        """Of all parts on disk."""
        return sum(part.bytes for part in self.parts)

    @property
    def rows_by_kind(self) -> dict[str, int]:
        rows: Counter[str] = Counter()
        for part in self.parts:
            rows[part.kind] += part.rows
        return dict(rows)

    @property
    def rows_by_bucket(self) -> dict[int, int]:
        return self._rows_by_bucket(SIDES)

    @property
    def rows_by_bucket_of_sides(self) -> dict[str, dict[int, int]]:
        """Of queries, and of keys and values: where each has a sampler, equal numbers are not the same bucket."""
        return {side: self._rows_by_bucket((side,)) for side in SIDES}

    def _rows_by_bucket(self, sides: Collection[str]) -> dict[int, int]:
        rows: Counter[int] = Counter()
        for part in self.parts:
            if KIND[part.kind].draw in sides:
                rows.update(part.buckets)
        return dict(sorted(rows.items()))

    @property
    def has_sections(self) -> bool:
        """Whether documents have sections, and so rows the column."""
        return bool(self.dataset.get(SECTIONS.name))

    @property
    def imported(self) -> bool:
        """Whether it was made of someone's files (`runs import`), which do not tell all that a run does."""
        return bool(self.dataset.get("imported"))

    @property
    def of_notebook(self) -> bool:
        """Whether it was captured from calls of a model (`sniff`), and has no configuration."""
        return bool(self.dataset.get("notebook"))

    @property
    def rows_by_section(self) -> dict[str, dict[str, int]] | None:
        """Rows by section, then kind, those of no section too; None where there are too many sections to list."""
        rows: dict[str, dict[str, int]] = {}
        for part in self.parts:
            if part.sections is None:
                return None if self.has_sections else {}
            for name, count in part.sections.items():
                of_kind = rows.setdefault(name, dict.fromkeys(self.rows_by_kind, 0))
                of_kind[part.kind] += count
        return dict(sorted(rows.items()))

    @property
    def not_finite(self) -> dict[int, dict[str, NotFinite]]:
        """Rows with a NaN or an infinity, of each layer and kind that has any, as far as its parts say."""
        found: dict[int, dict[str, NotFinite]] = {}
        for part in self.parts:
            if part.not_finite:
                kinds = found.setdefault(part.layer, {})
                kinds[part.kind] = kinds.get(part.kind, NotFinite()) + part.not_finite
        return {layer: dict(sorted(found[layer].items())) for layer in sorted(found)}

    @property
    def counts_not_finite(self) -> bool:
        """Whether all parts say how many rows hold a NaN or an infinity; those of early releases do not."""
        return all(part.not_finite is not None for part in self.parts)

    @property
    def digest(self) -> str:
        """Of all rows: equal for two runs that captured the same, however split into parts."""
        return combine(part.digest for part in self.parts)

    @property
    def digests(self) -> dict[int, dict[str, str]]:
        """Of the rows of each layer and kind."""
        found: dict[tuple[int, str], list[str]] = defaultdict(list)
        for part in self.parts:
            found[part.layer, part.kind].append(part.digest)
        return {layer: {kind: combine(found[layer, kind]) for kind in kinds} for layer, kinds in self.selection.items()}

    def row_counts(self) -> dict[str, Any]:
        """All of them as plain values, for the person who opens the file."""
        finite = {layer: {kind: asdict(one) for kind, one in kinds.items()} for layer, kinds in self.not_finite.items()}
        return {
            "total": self.rows,
            "by_kind": self.rows_by_kind,
            "by_bucket": self.rows_by_bucket_of_sides if has_sides(self.sampler) else self.rows_by_bucket,
            **({"by_section": self.rows_by_section} if self.has_sections else {}),
            "not_finite": finite if self.counts_not_finite else None,
        }
