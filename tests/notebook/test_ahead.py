"""What is drawn ahead is what is drawn at each step."""

from __future__ import annotations

import numpy as np
import pytest

from sniffer.forward.observer import draw
from sniffer.forward.selection import Selection
from sniffer.notebook.ahead import STRETCH, Ahead
from sniffer.sampler import All, LogUniform, PerSide, Sampler, picker_of
from sniffer.types import Document, TokenBatch

SELECTION = Selection({(layer, kind): (0,) for layer in (0, 3) for kind in ("q", "k", "v")})


@pytest.mark.parametrize("sampler", [LogUniform(base_rate=4.0, min_bucket_size=8), PerSide(q=LogUniform(), k=All())])
def test_steps_are_drawn_as_if_alone(sampler: Sampler):
    picker, found = picker_of(sampler, 3), 0
    ahead = Ahead(picker, SELECTION)
    for step in range(STRETCH + 9):
        # The last row has ended half way, and another text takes its place later.
        lengths = (1, 1, int(step < 20 or step > 40))
        ids = (5, 1 << 40, 7 if step < 40 else 8)
        token = np.zeros(1, dtype=np.int32)
        documents = tuple(
            Document(number, "", token[:n], False, first_position=start + step)
            for number, n, start in zip(ids, lengths, (0, 30, 1000), strict=True)
        )
        batch = TokenBatch(documents, 0)
        mine, theirs = ahead.draw(batch), draw(picker, SELECTION, batch)
        assert mine.keys() == theirs.keys()
        for pair, picks in theirs.items():
            for column in ("rows", "positions", "buckets"):
                one, other = getattr(mine[pair], column), getattr(picks, column)
                assert np.array_equal(one, other) and one.dtype == other.dtype
            found += len(picks)
    assert found > 20
