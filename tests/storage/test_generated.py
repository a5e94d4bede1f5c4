"""What a model has written, in examples.parquet and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sniffer.storage.examples import read_examples
from sniffer.storage.schema import Example
from sniffer.storage.writer import Listing
from sniffer.types import Generated, Sections


def example(number: int, prompt: int, ids: list[int], end: str) -> Example:
    sections = Sections.spread([(0, prompt, "prompt"), (prompt, prompt + len(ids), "generated")], prompt + len(ids))
    written = Generated(np.array(ids, dtype=np.int32), end)
    return Example(number, f"doc-{number}", prompt + len(ids), False, sections=sections, generated=written)


EXAMPLES = [example(3, 4, [7, 8, 9], "length"), example(1, 2, [5], "eos"), example(9, 1, [1 << 30, 0], "stop")]


def written(place: Path) -> Path:
    Listing.of(EXAMPLES).write(place)
    return place / "examples.parquet"


def test_examples_come_back_as_they_were(tmp_path: Path):
    assert read_examples(written(tmp_path)) == {one.example_id: one for one in EXAMPLES}


def test_a_prompt_is_what_was_there_before():
    prompt = EXAMPLES[0].prompt
    assert (prompt.n_tokens, prompt.generated) == (4, None)
    assert prompt.sections is not None and prompt.sections.spans() == [(0, 4, "prompt")]
    assert prompt.prompt is prompt


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("generated", [[5], [7, 8, 9, 1, 2, 3, 4, 5, 6], [1, 0]], "more was generated than they have"),
        ("generated", [[5], [7, -8, 9], [1, 0]], "tokens below 0"),
        ("end", ["eos", "whim", "stop"], "ends that are none of eos, stop, length"),
    ],
)
def test_what_cannot_have_been_written_is_refused(tmp_path: Path, column: str, values: list, said: str):
    path = written(tmp_path)
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, table.schema.field(column), pa.array(values, table[column].type)), path)
    with pytest.raises(ValueError, match=said):
        read_examples(path)


def test_a_file_that_stands_for_more_than_it_weighs_is_refused(tmp_path: Path):
    path = written(tmp_path)
    table = pq.read_table(path)
    place = table.schema.get_field_index("generated")
    many = pa.array([[5], [7] * 1_000_000, [1, 0]], table["generated"].type)
    pq.write_table(table.set_column(place, table.schema.field("generated"), many), path, compression="zstd")
    with pytest.raises(ValueError, match="bytes that stand for"):
        read_examples(path)
