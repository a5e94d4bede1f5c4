from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sniffer.hashing import GOLDEN, key_of, mix64, mix64_int, stable_id

words = st.integers(0, 2**64 - 1)


def test_mix64_is_splitmix64():
    # The first outputs of Vigna's splitmix64.c from seed 0.
    assert [mix64_int(GOLDEN * step) for step in (1, 2, 3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@given(st.lists(words, min_size=1))
def test_arrays_and_integers_agree_and_the_argument_is_left_alone(values: list[int]):
    array = np.array(values, dtype=np.uint64)
    assert mix64(array).tolist() == [mix64_int(value) for value in values]
    assert array.tolist() == values


parts = st.lists(st.one_of(st.integers(-(2**70), 2**70), st.text()))


@given(parts, parts)
def test_different_tuples_have_different_keys(one: list[int | str], other: list[int | str]):
    assert (key_of(*one) == key_of(*other)) == (one == other)


def test_keys_see_types_and_borders_and_take_numpy_integers():
    assert len({key_of(1), key_of("1"), key_of(1, ""), key_of("", 1), key_of()}) == 5
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of(np.int64(5), "q") == key_of(5, "q")


def test_keys_never_change():
    assert key_of(0, "example", 5, "layer", 3, "kind", "q") == 0xADE418BF097A623E
    assert stable_id("doc-1") == 2376381282532555307


@given(st.text())
def test_stable_ids_fit_a_signed_column(text: str):
    assert 0 <= stable_id(text) < 2**63
