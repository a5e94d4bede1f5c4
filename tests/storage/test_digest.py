from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniffer.hashing import key_of, mix64_int
from sniffer.storage.digest import Digest, combine, digest_rows, sum_rows
from sniffer.types import Rows

ROWS, DIM = 6, 5


def make_rows(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "bucket": rng.integers(0, 9, ROWS, dtype=np.int32),
        "position": rng.integers(0, 999, ROWS, dtype=np.int32),
        "token_id": rng.integers(0, 999, ROWS, dtype=np.int32),
        "example_id": rng.integers(0, 2**63, ROWS, dtype=np.int64),
        "vector": rng.standard_normal((ROWS, DIM)).astype(np.float32),
    }


def digest(rows: dict[str, np.ndarray], layer: int = 1, kind: str = "q", head: int = 2) -> Digest:
    places = {name: column for name, column in rows.items() if name != "vector"}
    return digest_rows(layer, kind, head, sum_rows(Rows(**places)), rows["vector"])


def picked(rows: dict[str, np.ndarray], which: Any) -> dict[str, np.ndarray]:
    return {name: column[which] for name, column in rows.items()}


@given(st.permutations(range(ROWS)), st.integers(0, ROWS))
def test_order_and_split_do_not_matter(order: list[int], cut: int):
    rows = make_rows()
    halves = digest(picked(rows, order[:cut])), digest(picked(rows, order[cut:]))
    assert halves[0] + halves[1] == digest(rows)
    assert combine(map(str, halves)) == str(digest(rows))


@given(
    st.sampled_from(["bucket", "position", "token_id", "example_id", "vector"]),
    st.integers(0, ROWS - 1),
    st.integers(0, DIM - 1),
    st.integers(0, 63),
)
def test_any_flipped_bit_of_any_field_matters(name: str, row: int, element: int, bit: int):
    rows = make_rows()
    changed = {other: column.copy() for other, column in rows.items()}
    cell = changed[name][row, element : element + 1] if name == "vector" else changed[name][row : row + 1]
    unsigned = cell.view({4: np.uint32, 8: np.uint64}[cell.itemsize])
    unsigned ^= unsigned.dtype.type(1 << bit % (8 * cell.itemsize))
    assert digest(changed) != digest(rows)


def test_where_a_row_is_from_matters():
    rows = make_rows()
    places = [(1, "q", 2), (2, "q", 2), (1, "k", 2), (1, "q", 3), (2, "q", 1)]
    assert len({digest(rows, *place) for place in places}) == len(places)


def test_what_looks_alike_is_told_apart():
    rows = make_rows()
    negated = rows | {"vector": -rows["vector"]}
    swapped = rows | {"vector": rows["vector"][:, ::-1]}
    moved = rows | {"vector": rows["vector"][[1, 0, *range(2, ROWS)]]}
    exchanged = rows | {"position": rows["token_id"], "token_id": rows["position"]}
    zeros = [rows | {"vector": np.full((ROWS, DIM), zero, dtype=np.float32)} for zero in (0.0, -0.0)]
    doubled = {name: np.concatenate([column, column]) for name, column in rows.items()}
    several = [rows, negated, swapped, moved, exchanged, *zeros, doubled]
    assert len({digest(some) for some in several}) == len(several)


def test_nan_equals_itself():
    rows = make_rows() | {"vector": np.full((ROWS, DIM), np.nan, dtype=np.float32)}
    assert digest(rows) == digest(rows)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    whole = digest(make_rows())
    monkeypatch.setattr("sniffer.storage.digest.BLOCK", 4)
    assert digest(make_rows()) == whole


def test_text_round_trip_and_no_rows():
    value = digest(make_rows())
    assert Digest.parse(str(value)) == value
    assert combine([]) == "0" * 32 == str(digest(picked(make_rows(), slice(0))))
    with pytest.raises(ValueError, match="32 hexadecimal"):
        Digest.parse("12")


def test_is_what_plain_python_makes_of_the_definition():
    """Manifests keep digests, so the definition may not drift."""
    rows = make_rows()
    total = [0, 0]
    for row in range(ROWS):
        example_id = int(rows["example_id"][row])
        places = [int(rows[name][row]) for name in ("bucket", "position", "token_id")]
        words = [*places, example_id % 2**32, example_id >> 32, *rows["vector"][row].view(np.uint32).tolist()]
        weights = [mix64_int(0x9E3779B97F4A7C15 * (word + 1)) | 1 for word in range(len(words))]
        value = key_of("row", 1, "q", 2) + sum(w * weight for w, weight in zip(words, weights, strict=True))
        total[0] += mix64_int(value)
        total[1] += mix64_int(mix64_int(value) ^ key_of("second lane"))
    assert digest(rows) == Digest(total[0] % 2**64, total[1] % 2**64)
