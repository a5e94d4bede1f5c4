"""Samples of a run that has every position: what another sampler would have kept of it.

Decisions are made by the sampler's own law and hash, so that a sample here is what a run with that sampler and
seed would have captured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.sampler import LogUniform, Picker, Sampler, Uniform
from sniffer.types import Document

from ..common.rows import WEIGHTS, LayerVectors

SAMPLERS = ("uniform", "log_uniform")


def make_sampler(name: str, base_rate: float, bucket_size: int) -> Sampler:
    if name == "uniform":
        return Uniform(base_rate=float(base_rate), bucket_size=bucket_size)
    return LogUniform(base_rate=float(base_rate), min_bucket_size=bucket_size)


def require_every_position(run: Run) -> None:
    """Raises RunError unless the run kept all positions of its documents."""
    laws = [run.manifest.probability_by_bucket(kind) for kind in run.kinds]
    if any(not law or min(law.values()) < 1 for law in laws):
        raise RunError(
            f"{run.folder} was sampled, and the truth needs every position: capture with sampler=all "
            "(a few short documents do)"
        )


@dataclass(frozen=True)
class Population:
    """All positions of a layer's documents: the documents, and the row at each position of each of them."""

    documents: tuple[Document, ...]
    first: dict[int, np.ndarray]

    @classmethod
    def of(cls, rows: LayerVectors) -> Population:
        places = {}
        for example in np.unique(rows.example_ids):
            inside = np.flatnonzero(rows.example_ids == example)
            places[int(example)] = inside[np.argsort(rows.positions[inside])]
        documents = tuple(
            Document(example, str(example), np.zeros(len(found), dtype=np.int32), False)
            for example, found in places.items()
        )
        return cls(documents, places)

    def __len__(self) -> int:
        return sum(document.n_tokens for document in self.documents)

    def sample(self, rows: LayerVectors, picker: Picker, draw: str, weights: str) -> LayerVectors:
        """The rows that the picker keeps; weights as in `experiments.common.rows.load`."""
        kept = np.concatenate(
            [
                self.first[document.example_id][picker.positions(document, rows.layer, draw)]
                for document in self.documents
            ]
        )
        # The order in which a run has its rows.
        kept = kept[np.lexsort((rows.positions[kept], rows.example_ids[kept], rows.buckets[kept]))]
        some = rows.take(kept)
        if weights == WEIGHTS[1]:
            # Counted evenly, so that their sum still stands for all positions.
            return replace(some, weights=np.full(len(some), len(self) / max(1, len(some))))
        return replace(some, weights=1 / picker.sampler.probability(some.positions.astype(np.int64)))
