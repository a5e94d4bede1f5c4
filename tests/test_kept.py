"""What a session has on disk decides what goes through the model again, by the law."""

from __future__ import annotations

import numpy as np
import pytest

from sniffer.errors import RunError
from sniffer.kept import Kept
from sniffer.sampler import All, Picker, Uniform
from sniffer.schema import Example
from sniffer.types import Document, TokenBatch

PAIRS = [(0, "q"), (0, "k"), (0, "q_pre")]


def batch_of(*ids: int, n_tokens: int = 10) -> TokenBatch:
    return TokenBatch(tuple(Document(i, str(i), np.zeros(n_tokens, np.int32), False) for i in ids), pad_id=0)


def picks(batch: TokenBatch, sampler=All()):  # noqa: B008 - frozen
    picker = Picker(sampler, 0)
    return {(0, side): picker.pick(batch, 0, side) for side in ("q", "k")}


def committed(*ids: int) -> dict[int, Example]:
    return {document.example_id: Example.of(document) for document in batch_of(*ids).documents}


def test_a_fresh_run_lacks_everything():
    batch = batch_of(1, 2)
    assert Kept().lacks(batch, picks(batch), PAIRS)
    assert Kept().done(batch, PAIRS) == {}


def test_committed_documents_lack_nothing():
    batch = batch_of(1, 2)
    kept = Kept(committed(1, 2, 3))
    assert not kept.lacks(batch, picks(batch), PAIRS)
    assert kept.lacks(batch_of(1, 4), picks(batch_of(1, 4)), PAIRS)


def test_a_pair_that_is_not_there_is_lacked():
    batch = batch_of(1, 2)
    everywhere = dict.fromkeys(PAIRS, frozenset({1, 2}))
    assert not Kept(pending=everywhere).lacks(batch, picks(batch), PAIRS)
    for pair in PAIRS:
        some = everywhere | {pair: frozenset({1})}
        assert Kept(pending=some).lacks(batch, picks(batch), PAIRS)
        assert Kept(pending=some).done(batch, PAIRS)[pair] == {1}


def test_a_document_of_which_nothing_is_kept_is_not_lacked():
    batch = batch_of(1, 2)
    nothing = picks(batch, Uniform(base_rate=0.0))
    assert not Kept(pending={(0, "q"): frozenset({9})}).lacks(batch, nothing, PAIRS)


def test_what_is_done_includes_committed_documents():
    kept = Kept(committed(1), {(0, "q"): frozenset({2})})
    done = kept.done(batch_of(1, 2, 3), PAIRS)
    assert done == {(0, "q"): {1, 2}, (0, "k"): {1}, (0, "q_pre"): {1}}


def test_a_changed_document_is_named():
    kept, changed = Kept(committed(1)), batch_of(1, n_tokens=11)
    with pytest.raises(RunError, match="'1' has changed: 10 tokens when it was captured, 11 now"):
        kept.lacks(changed, picks(changed), PAIRS)
    assert not Kept(committed(1), strict=False).lacks(changed, picks(changed), PAIRS)
