"""Groups of a run's documents, each measured alone: how far what an analysis says depends on which documents there are.

Documents are dealt into groups at random, and an analysis measures each group as if it were the run. The spread between
the groups' numbers, over the root of how many groups there are, is the standard error of a number of all documents
together (the method of random groups; Mahalanobis, 1946; Wolter, 2007, chapter 2). It asks nothing of an analysis but
that it can measure a run, and costs about as much as measuring once more. Rows of one document are alike, so documents
are dealt, not rows; windows of one text stay together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from sniffer.errors import RunError
from sniffer.reader.run import Run


@dataclass(frozen=True)
class Dealt:
    """`groups` of example_ids. Two runs of the same documents have the same, whatever else they are of."""

    groups: tuple[frozenset[int], ...]

    @property
    def documents(self) -> frozenset[int]:
        return frozenset().union(*self.groups)


def text_of_each(run: Run) -> dict[int, Any]:
    """The text that each document is of, by example_id, in the order of the run: windows of one text share it."""
    table = run.examples()
    ids = table["example_id"].to_list()
    texts = table["source"].to_list() if "source" in table.columns else ids
    return dict(zip(ids, texts, strict=True))


def deal(run: Run, groups: int, seed: int) -> Dealt | None:
    """Deals a run's documents into groups of nearly equal numbers, at most as many as there are; None below two."""
    by_text: dict[Any, list[int]] = {}
    for number, text in sorted(text_of_each(run).items(), key=lambda pair: pair[0]):
        by_text.setdefault(text, []).append(number)
    count = min(groups, len(by_text))
    if count < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(by_text)) % count
    dealt: list[set[int]] = [set() for _ in range(count)]
    for group, numbers in zip(order.tolist(), by_text.values(), strict=True):
        dealt[group].update(numbers)
    return Dealt(tuple(map(frozenset, dealt)))


class Portion(Run):
    """A run as if it had the rows of some documents only, for analyses that read by `scan`.

    What is read is kept, so that portions of one `source` read it once.
    """

    def __init__(self, source: Source, documents: Iterable[int]) -> None:
        super().__init__(source.run.folder, source.run.manifest, source.run.sections_only)
        self._source, self._documents = source, sorted(documents)

    @property
    def sections_only(self) -> tuple[str, ...]:
        """Not None, as of any run that is only a part of one: its moments are those of all documents, and no use."""
        return super().sections_only or ()

    def scan(self, *wanted: Any, **options: Any) -> pl.LazyFrame:
        """As `Run.scan`."""
        return self._source.rows(*wanted, **options).lazy().filter(pl.col("example_id").is_in(self._documents))

    def only(self, sections: Iterable[str]) -> Portion:
        """As `Run.only`."""
        return Portion(Source(self._source.run.only(sections)), self._documents)

    def examples(self) -> pl.DataFrame:
        """As `Run.examples`, of all documents."""
        return self._source.documents

    def check(self, layer: int, kind: str) -> None:
        """Its source has been looked at."""

    def refused(self, *_: Any, **__: Any) -> Any:
        """What is not read by `scan` would be of all documents.

        Raises:
            RunError: always.
        """
        raise RunError("it reads otherwise than a portion of a run can be read")

    vectors = attention = moments = scores = pairs = refused


class Source:
    """A run whose portions are taken; `rows` are kept until those of another layer are asked for."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._layer: Any = None
        self._kept: dict[str, pl.DataFrame] = {}

    @cached_property
    def documents(self) -> pl.DataFrame:
        """As `Run.examples`."""
        return self.run.examples()

    def rows(self, layers: Any = None, *wanted: Any, **options: Any) -> pl.DataFrame:
        """What `Run.scan` of the whole run has."""
        if layers != self._layer:
            self._layer, self._kept = layers, {}
        key = repr((wanted, options))
        if key not in self._kept:
            self._kept[key] = self.run.scan(layers, *wanted, **options).collect()
        return self._kept[key]
