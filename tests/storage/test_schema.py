from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from sniffer.forward.columns import Columns
from sniffer.storage.layout import RunFolder
from sniffer.storage.schema import Footer, row_schema
from sniffer.types import Column, Rows
from tests.helpers_storage import make_columns, make_footer


def test_no_column_can_hold_a_null():
    schema = row_schema([Column("vector", 64)])
    assert schema.names == ["head", "bucket", "position", "token_id", "example_id", "vector"]
    assert [str(field.type) for field in schema][:5] == ["int16", "int32", "int32", "int32", "int64"]
    vector = schema.field("vector").type
    assert (vector.list_size, vector.value_type) == (64, pa.float32())
    assert not any(field.nullable for field in [*schema, vector.value_field])


def test_footer_round_trip():
    footer = make_footer()
    assert Footer.decode(footer.encode()) == footer


def test_footer_keys_of_a_later_release_are_left_out():
    encoded = make_footer().encode()
    later = {key: value.replace(b"{", b'{"new": 1, ', 1) for key, value in encoded.items()}
    assert Footer.decode(later) == make_footer()


def test_a_foreign_footer_is_refused():
    with pytest.raises(KeyError):
        Footer.decode({b"pandas": b"{}"})


@pytest.mark.parametrize(("n_layers", "name"), [(1, "layer=07"), (100, "layer=07"), (101, "layer=007")])
def test_layers_sort_as_numbers(n_layers: int, name: str):
    assert RunFolder.part(7, "q_pre", 3, n_layers) == f"captures/{name}/kind=q_pre/part-00003.parquet"


def test_columns_count_positions_and_refuse_other_lengths():
    columns = make_columns(rows=50, heads=(0, 2))
    assert len(columns) == 50
    rows = Rows(*(np.zeros(2, np.int32),) * 3, np.zeros(2, np.int64))
    with pytest.raises(AssertionError, match="different lengths"):
        Columns((0,), [torch.zeros(3, 4)], rows, 4)
    with pytest.raises(AssertionError, match="different lengths"):
        replace(rows, position=np.zeros(3, np.int32))
    with pytest.raises(AssertionError, match="heads x dim"):
        Columns((0, 1), [torch.zeros(2, 4)], rows, 4)
