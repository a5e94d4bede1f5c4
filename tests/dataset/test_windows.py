"""A long text in windows: each is a document, together they have every token, and their rows are as any document's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniffer import open_run
from sniffer.dataset.packages import Pydoc
from sniffer.dataset.tokenizing import Tokenizer, spans, windows
from sniffer.errors import ConfigError, DatasetError
from sniffer.runs.verify import verify
from sniffer.storage.examples import read_examples
from sniffer.storage.schema import Example
from sniffer.storage.writer import Listing
from sniffer.types import Document
from tests.dataset.test_batching import Texts, by_letter
from tests.helpers_runs import ORDER, Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint, save_texts

LONG = {f"doc-{n}": f"text {n}: " + "the cat sat on the mat, " * (n * 3) for n in range(5)}
WINDOWS = ("dataset.window=50", "dataset.stride=20")


@given(st.integers(1, 200), st.integers(1, 50), st.data())
def test_windows_together_have_every_token_and_none_is_spare(n: int, window: int, data: st.DataObject):
    stride = data.draw(st.integers(1, window))
    found = list(spans(n, window, stride))
    assert [start for start, _ in found] == [number * stride for number in range(len(found))]
    assert all(end == min(start + window, n) for start, end in found)
    assert {token for span in found for token in range(*span)} == set(range(n))
    assert found[-1][1] == n and all(end < n for _, end in found[:-1])


def windows_of(*texts: str, **keys: Any) -> list[Any]:
    dataset: Any = Texts(*texts)
    dataset.window, dataset.stride = keys.get("window"), keys.get("stride")
    return list(Tokenizer(by_letter, keys.get("max_tokens")).documents(dataset))


def test_a_window_is_known_by_its_text_and_its_offset():
    made = windows_of("abcdefghij", "xy", window=4, stride=3)
    assert [(d.source_id, d.source, d.offset, bytes(d.token_ids.astype(np.uint8))) for d in made] == [
        ("row-0", "row-0", 0, b"abcd"),
        ("row-0@3", "row-0", 3, b"defg"),
        ("row-0@6", "row-0", 6, b"ghij"),
        ("row-1", "row-1", 0, b"xy"),
    ]
    assert len({d.example_id for d in made}) == 4
    other = windows_of("abcdefghij", window=9, stride=3)
    assert [d.example_id for d in other] == [d.example_id for d in made[:2]]  # nothing else has a say in it


def test_the_first_window_is_the_text_cut_to_it():
    (cut,), (first, *_) = windows_of("abcdef", max_tokens=4), windows_of("abcdef", window=4)
    assert (cut.example_id, cut.source_id) == (first.example_id, first.source_id)
    assert np.array_equal(cut.token_ids, first.token_ids)


def test_a_text_is_cut_before_its_windows_are_taken_and_that_is_said():
    made = windows_of("abcdefgh", window=4, max_tokens=6)
    assert [(d.n_tokens, d.truncated) for d in made] == [(4, False), (2, True)]


def test_an_id_that_reads_like_a_window_is_refused():
    class Odd(Texts):
        window, stride = 4, None

        def texts(self):
            yield 1, "a@3", "abc"

    with pytest.raises(DatasetError, match="'a@3': its id ends as ids of windows do"):
        list(Tokenizer(by_letter, None).documents(Odd("x")))


@pytest.mark.parametrize(
    ("keys", "named"),
    [({"window": 0}, "window=0"), ({"window": 4, "stride": 0}, "stride=0"), ({"window": 4, "stride": 5}, "that is 4")]
    + [({"stride": 5}, "is not set")],
)
def test_windows_that_lose_tokens_are_refused(keys: dict[str, int], named: str):
    with pytest.raises(ConfigError, match=named):
        Pydoc(**keys)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("windows")
    return Runs(save_checkpoint(place / "checkpoint"), save_texts(place / "texts.jsonl", LONG), place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.start("whole", *WINDOWS)


def test_a_run_lists_where_each_window_is_from(whole: Path):
    manifest, problems = verify(whole)
    assert problems == [] and manifest.counts["truncated"] == 0 and "dropped" not in manifest.counts
    listed = open_run(whole).examples()
    assert listed.columns == ["example_id", "source_id", "n_tokens", "truncated", "source", "offset"]
    for source, text in LONG.items():
        mine = listed.filter(pl.col("source") == source).sort("offset")
        assert mine["offset"].to_list() == [start for start, _ in spans(len(text), 50, 20)]
        assert (mine["offset"] + mine["n_tokens"]).max() == len(text)
    tokens = rows(whole).join(listed, on="example_id").filter(pl.col("source") == "doc-4")
    text = LONG["doc-4"].encode()
    place = save_checkpoint(whole.parent / "again")
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(place)(text.decode())["input_ids"]
    assert all(
        ids[offset + position] == token for offset, position, token in tokens["offset", "position", "token_id"].rows()
    )


def test_windows_change_nothing_where_texts_are_shorter(runs: Runs):
    plain, wide = runs.start("plain"), runs.start("wide", "dataset.window=2000")
    assert rows(plain).equals(rows(wide))
    assert open_run(plain).examples().columns == ["example_id", "source_id", "n_tokens", "truncated"]


def test_the_rows_of_first_windows_are_those_of_cut_texts(runs: Runs, whole: Path):
    cut = rows(runs.start("cut", "dataset.max_tokens=50"))
    first = open_run(whole).examples().filter(pl.col("offset") == 0)
    assert rows(whole).join(first, on="example_id", how="semi").sort(ORDER).equals(cut)


@pytest.mark.parametrize("batches", [1, 3])
def test_a_stopped_run_of_windows_is_completed_exactly(runs: Runs, whole: Path, batches: int):
    folder = runs.start(f"stopped-{batches}", *WINDOWS, "output.checkpoint_every=4", stop_after=batches)
    assert verify(folder)[1] == []
    assert take_up(folder)
    must_be_whole(folder, whole)


def test_shards_of_windows_are_the_whole(runs: Runs, whole: Path):
    shards = [runs.start(f"shard-{n}", *WINDOWS, "dataset.shard.count=2", f"dataset.shard.index={n}") for n in range(2)]
    must_be_alike(pl.concat(map(rows, shards)).sort(ORDER), rows(whole))


@pytest.mark.long
def test_many_windows_of_one_text_are_read_again(tmp_path: Path):
    """Their file is small for what it stands for, and none that is refused as one that blows up."""
    text = Document(5, "a long text with a long name", np.zeros(200_000, np.int32), False)
    listing = Listing.of(Example.of(window) for window in windows(text, 8, 2))
    listing.write(tmp_path)
    assert len(read_examples(tmp_path / listing.record.path, listing.record)) == 99_997


def must_be_alike(one: pl.DataFrame, other: pl.DataFrame) -> None:
    """The same rows, but for the rounding that other batches bring."""
    assert one.drop("vector").equals(other.drop("vector"))
    assert np.allclose(one["vector"].to_numpy(), other["vector"].to_numpy(), rtol=1e-4, atol=1e-5)


def test_what_is_cut_off_is_counted_and_said(runs: Runs, capsys: Any, caplog: Any):
    folder = runs.start("said", "dataset.max_tokens=50")
    dropped = sum(max(0, len(text) - 50) for text in LONG.values())
    assert verify(folder)[0].counts["dropped"] == dropped
    assert f"(4 truncated by {dropped} tokens," in " ".join(capsys.readouterr().out.split())
    assert f"{dropped} tokens beyond the first 50 of their texts were cut off" in caplog.text
    assert "dataset.max_tokens=null dataset.window=50" in caplog.text
