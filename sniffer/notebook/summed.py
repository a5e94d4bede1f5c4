"""Sums over all positions of what calls have added, as a run's moments."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sniffer.errors import RunError
from sniffer.forward.moments.counting import Counting, MomentsPlan, Totals
from sniffer.reader.moments import merged
from sniffer.types import MomentRows, Moments


class Summed:
    """Those of all calls since `clear`.

    `lost` counts tokens of documents that a cache has lost after they were summed up, which cannot be undone.
    """

    def __init__(self, plan: MomentsPlan) -> None:
        self.plan = plan
        self.clear()

    def clear(self) -> None:
        self.lost = 0
        self._totals = Totals(self.plan)

    def take(self, counting: Counting) -> None:
        """Those of a call that went well."""
        with torch.inference_mode():
            self._totals.take(counting)

    def of(self, layer: int, head: int, kind: str, bucket: int | None, section: str | None) -> Moments:
        """Of one head, as `run.moments`.

        Raises:
            RunError: they were not asked for, there are none, or they are not of the documents alone.
        """
        heads = self.plan.heads.get((layer, kind), ())
        if head not in heads:
            raise RunError(f"layer {layer}, kind {kind}, head {head} was not counted: see captured.selection.moments")
        for rows in self.rows():
            if rows and (rows[0].layer, rows[0].kind) == (layer, kind):
                found = [(one.bucket, one.section, one.of(head, self.plan.layout)) for one in rows]
                return merged(found, bucket, section)
        raise RunError("no document has been counted: there are no moments")

    def rows(self) -> Iterator[list[MomentRows]]:
        """All there is of each (layer, kind).

        Raises:
            RunError: they are of tokens that are no documents' any more.
        """
        if self.lost:
            raise RunError(
                f"moments are of {self.lost} tokens that a cache has lost since, as wrong guesses of assisted "
                "decoding are, and sums cannot be taken back: sniff without moments, or generate without an assistant"
            )
        return self._totals.rows()
