from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniffer.storage import sort as arrange
from sniffer.storage.sort import row_groups, spans
from tests.helpers_storage import make_columns

KIB = 1024


@given(st.lists(st.integers(0, 3000), max_size=8), st.sampled_from([256, 512, 4096]))
def test_row_groups_cover_the_rows_and_keep_their_sizes(lengths: list[int], row_bytes: int):
    buckets = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    groups = row_groups(buckets, row_bytes)
    assert [row for group in groups for row in range(group.start, group.stop)] == list(range(len(buckets)))
    for group in groups:
        size = (group.stop - group.start) * row_bytes
        assert size >= 512 * KIB or len(groups) == 1
        assert size <= 8 * KIB * KIB
        new_bucket = group.start == 0 or buckets[group.start] != buckets[group.start - 1]
        assert new_bucket or size > 3 * KIB * KIB


def test_every_large_bucket_has_its_row_group():
    buckets = np.repeat(np.arange(4, dtype=np.int32), 2048)
    assert row_groups(buckets, 256) == [slice(2048 * i, 2048 * (i + 1)) for i in range(4)]


def test_a_huge_bucket_is_cut():
    rows = 3 * 8 * KIB * KIB // 4096
    groups = row_groups(np.zeros(rows, dtype=np.int32), 4096)
    assert [group.stop - group.start for group in groups] == [rows // 3] * 3


@pytest.mark.parametrize("chunks", [1, 2, 7])
@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_spans_bring_every_row_to_its_place(chunks: int, limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrange, "MIN_ROW_GROUP_BYTES", min(64, limit))
    monkeypatch.setattr(arrange, "MAX_SPAN_BYTES", limit)
    columns = make_columns(rows=40, heads=(1, 5, 6), dim=4, chunks=chunks)
    order = columns.rows.order
    keys = list(
        zip(columns.rows.bucket[order], columns.rows.example_id[order], columns.rows.position[order], strict=True)
    )
    assert keys == sorted(keys)
    plan = spans(columns, order)
    assert np.concatenate([np.arange(40)[span.rows] for span in plan]).tolist() == list(range(40))
    flat = np.concatenate([chunk.numpy() for chunk in columns.vectors]).reshape(40, 3, 4)
    for place in range(3):
        got = np.concatenate([span.vectors(columns, place) for span in plan])
        assert (got.view(np.uint32) == flat[order, place].view(np.uint32)).all()


def test_no_rows_no_spans():
    columns = make_columns(rows=0, chunks=1)
    assert spans(columns, columns.rows.order) == []
