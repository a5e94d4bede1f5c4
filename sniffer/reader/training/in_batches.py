"""What a run and a sweep have in common: their rows in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sniffer.reader.held import Held
from sniffer.reader.training.batches import MEMORY, Batches, batches_of


class InBatches:
    """Something that is a run, or some."""

    def _together(self, layer: int, kind: str) -> Sequence[tuple[Held, Collection[str] | None]]:
        """The runs that have a layer and kind, each with the sections it is opened for.

        Raises:
            RunError: none has, or they cannot be read together.
        """
        raise NotImplementedError

    def batches(
        self,
        *,
        layer: int,
        kind: str = "k",
        heads: Iterable[int] | None = None,
        size: int = 1024,
        shuffle: int | None = None,
        weights: bool = False,
        rank: int = 0,
        world: int = 1,
        epochs: int = 1,
        memory: int = MEMORY,
    ) -> Batches:
        """The rows of a layer and kind in batches, to train something with: each once in every epoch.

        Args:
            layer, kind: which; one kind of vector.
            heads: key heads for k, v and k_pre; None for all that were captured.
            size: rows of a batch; the last ones of an epoch may have fewer.
            shuffle: a seed; None gives rows as they lie in the files (by head, bucket, document and position).
            weights: whether batches have 1 / inclusion_probability of each row.
            rank, world: which share of so many. Shares are disjoint, are all rows together, differ by one row at most,
                and have equally many batches.
            epochs: how often; each is shuffled anew.
            memory: bytes that rows may take while they wait for their turn, beside the batches. Row groups come in an
                order drawn over all of them; rows in one drawn over as many row groups as fit into nearly half of it.

        Raises:
            RunError: a layer, kind or head was not captured, an argument cannot be, or a file cannot be read.
        """
        return batches_of(
            self._together(layer, kind),
            layer=layer,
            kind=kind,
            heads=heads,
            size=size,
            shuffle=shuffle,
            weights=weights,
            rank=rank,
            world=world,
            epochs=epochs,
            memory=memory,
        )
