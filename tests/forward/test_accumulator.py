"""Rows that are on disk already are left out, by document and pair, and nothing else is."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sniffer.forward.accumulator import Accumulator
from sniffer.forward.selection import Selection
from sniffer.sampler import All, Picker
from sniffer.types import Document, TokenBatch

SELECTION = Selection({(0, "q"): (0, 1), (0, "k"): (0,), (0, "q_pre"): (0,)})
DIM = 2


def filled(done: dict[tuple[int, str], frozenset[int]]) -> Accumulator:
    documents = tuple(Document(i, str(i), np.full(3 + i, i, np.int32), False) for i in range(4))
    batch, picker = TokenBatch(documents, 0), Picker(All(), 0)
    picks = {(0, side): picker.pick(batch, 0, side) for side in ("q", "k")}
    accumulator = Accumulator(SELECTION)
    vectors = {
        (layer, kind): picks[layer, "k" if kind == "k" else "q"].positions[:, None].repeat(DIM * len(heads), 1)
        for (layer, kind), heads in SELECTION.heads.items()
    }
    tensors = {pair: torch.from_numpy(rows.astype(np.float32)) for pair, rows in vectors.items()}
    accumulator.add(batch, picks, tensors, done)
    return accumulator


@given(st.dictionaries(st.sampled_from(sorted(SELECTION.heads)), st.frozensets(st.integers(0, 5))))
def test_only_what_is_done_is_left_out(done: dict[tuple[int, str], frozenset[int]]):
    accumulator = filled(done)
    for pair, heads in SELECTION.heads.items():
        columns = accumulator.columns(*pair, DIM)
        assert set(columns.rows.example_id.tolist()) == set(range(4)) - done.get(pair, frozenset())
        assert (columns.rows.token_id == columns.rows.example_id).all()
        if len(columns):
            found = torch.cat(columns.vectors)
            assert (found == torch.from_numpy(columns.rows.position)[:, None]).all()
        assert accumulator.held(*pair) == len(columns) * len(heads) * DIM * 4
    assert accumulator.nbytes == sum(accumulator.held(*pair) for pair in SELECTION.heads)


def test_released_rows_are_gone_and_others_stay():
    accumulator = filled({})
    assert accumulator.by_size()[0] == (0, "q")
    kept = len(accumulator.columns(0, "q_pre", DIM))
    accumulator.release(0, "q")
    assert len(accumulator.columns(0, "q", DIM)) == 0 and accumulator.held(0, "q") == 0
    assert len(accumulator.columns(0, "q_pre", DIM)) == kept > 0
    assert (0, "q") not in accumulator.by_size()
