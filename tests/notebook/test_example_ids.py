"""An id belongs to one document whose rows were kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sniffer.errors import CaptureError, ConfigError
from sniffer.hashing import stable_id
from sniffer.notebook.example_ids import ExampleIds


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans())), st.booleans())
def test_ids_come_in_order_whatever_fails(calls: list[tuple[int, bool]], listed: bool):
    """Of calls with some rows each, of which some fail, those that do not have the ids in order, each once."""
    ids = ExampleIds([10 * n for n in range(100)] if listed else None)
    kept: list[int] = []
    for n_rows, fails in calls:
        taken = ids.take(n_rows)
        if fails:
            ids.give_back(taken)
        else:
            kept += taken
    assert kept == [(10 if listed else 1) * n for n in range(len(kept))]


def test_a_call_with_too_many_rows_takes_none():
    ids = ExampleIds([7, 8, 9])
    assert ids.take(1) == [7]
    with pytest.raises(CaptureError, match=r"more rows than example_ids are left \(2 for 3\)"):
        ids.take(3)
    assert ids.take(2) == [8, 9]


@pytest.mark.parametrize("good", [[3, 4], (3, 4), np.array([3, 4]), torch.tensor([3, 4]), range(3, 5), iter([3, 4])])
def test_whole_numbers_of_any_kind_will_do(good: Any):
    assert ExampleIds(good).take(2) == [3, 4]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ([1, 1], "example_ids has 1 twice"),
        ([5, -1], r"example_ids has -1: give whole numbers in \[0, 2\^63\)"),
        ([2**63], "example_ids has 9223372036854775808"),
        ([1.5], "example_ids has 1.5"),
        ([True], "example_ids has True"),
        (np.array([True]), "example_ids has"),
        ([None], "example_ids has None"),
        (["a", "a"], "example_ids has a twice"),
        ("ab", "example_ids='ab' is no list"),
        (5, "example_ids=5 is no list"),
    ],
)
def test_what_is_no_id_is_refused_before_the_model_is_touched(bad: Any, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        ExampleIds(bad)


def test_those_that_come_one_by_one_are_checked_as_they_come():
    def given_ids() -> Iterator[Any]:
        yield from (1, 2, 2)

    ids = ExampleIds(given_ids())
    assert ids.take(1) == [1]
    with pytest.raises(ConfigError, match="has 2 twice"):
        ids.take(2)
    assert ids.take(1) == [2]


def test_texts_are_the_ids_that_a_dataset_has():
    ids = ExampleIds(["a", 4, "b"])
    assert ids.take(3) == [stable_id("a"), 4, stable_id("b")]
    assert ids.names == {stable_id("a"): "a", stable_id("b"): "b"}
