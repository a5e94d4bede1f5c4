"""Batches hold every document once, within budget and with little padding; reading happens ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniffer.dataset import feed as module
from sniffer.dataset.batching import MAX_PADDING, PROMPT_PADDING, batches
from sniffer.dataset.feed import Ahead, Chunk, Feed, chunks
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import CheckpointError, DatasetError
from sniffer.types import Document, LengthClasses


def document(number: int, n_tokens: int) -> Document:
    return Document(number, str(number), np.full(n_tokens, number, np.int32), truncated=False)


class Texts:
    """A dataset of given texts."""

    max_tokens = None

    def __init__(self, *texts: str) -> None:
        self.rows = texts

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self) -> Iterator[tuple[int, str, str]]:
        for row, text in enumerate(self.rows):
            yield row, f"row-{row}", text

    def describe(self) -> dict:
        return {}


def by_letter(text: str) -> np.ndarray:
    return np.array([ord(letter) for letter in text.strip()])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 1000))
def test_batches_hold_every_document_once_within_budget(lengths: list[int], max_tokens: int):
    documents = [document(i, n) for i, n in enumerate(lengths)]
    made = list(batches(documents, max_tokens, pad_id=0))
    assert sorted(d.example_id for batch in made for d in batch.documents) == list(range(len(lengths)))
    for batch in made:
        if len(batch.documents) > 1:
            assert batch.padded_tokens <= max_tokens
            assert batch.padded_tokens <= MAX_PADDING * batch.n_tokens


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 2000), st.integers(1, 200))
def test_prompts_have_room_for_what_comes_after_them(lengths: list[int], max_tokens: int, new: int):
    documents = [document(i, n) for i, n in enumerate(lengths)]
    made = list(batches(documents, max_tokens, pad_id=0, new_tokens=new))
    assert sorted(d.example_id for batch in made for d in batch.documents) == list(range(len(lengths)))
    for batch in made:
        rows, real = len(batch.documents), sum(d.n_tokens + new for d in batch.documents)
        assert rows == 1 or rows * (batch.seq_len + new) <= min(max_tokens, PROMPT_PADDING * real)
    # Where steps are what costs, prompts of all lengths go together.
    together = list(batches([document(0, 30), document(1, 5)], 1000, pad_id=0, new_tokens=40))
    assert len(together) == 1


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.randoms())
def test_batches_do_not_depend_on_the_order_of_documents(lengths: list[int], random):
    documents = [document(i, n) for i, n in enumerate(lengths)]
    shuffled = random.sample(documents, len(documents))

    def ids(source: list[Document]) -> list[list[int]]:
        return [[d.example_id for d in batch.documents] for batch in batches(source, 500, pad_id=0)]

    assert ids(documents) == ids(shuffled)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.integers(1, 1000),
    st.lists(st.integers(2, 300), max_size=3, unique=True),
    st.none() | st.integers(1, 300),
)
def test_documents_of_a_batch_are_treated_alike(lengths: list[int], most: int, breaks: list[int], apart: int | None):
    classes = LengthClasses(tuple(sorted(breaks)), apart)
    documents = [document(i, n) for i, n in enumerate(lengths)]
    made = list(batches(documents, most, 0, classes))
    assert sorted(d.example_id for batch in made for d in batch.documents) == list(range(len(lengths)))
    for batch in made:
        sizes = {d.n_tokens for d in batch.documents}
        assert not any(min(sizes) < limit <= max(sizes) for limit in breaks)
        assert len(sizes) == 1 or apart is None or max(sizes) < apart


def test_padding_is_on_the_right():
    (batch,) = batches([document(1, 40), document(2, 39)], 100, pad_id=9)
    ids = batch.input_ids()
    assert ids.shape == (2, 40)
    assert (ids[0] == 1).all() and (ids[1, :39] == 2).all() and ids[1, 39] == 9


def test_empty_texts_are_skipped_and_long_ones_cut_and_both_counted():
    tokenizer = Tokenizer(by_letter, max_tokens=3)
    documents = list(tokenizer.documents(Texts("abcde", "", " \n ", "xy")))
    assert [(d.source_id, d.n_tokens, d.truncated) for d in documents] == [
        ("row-0", 3, True),
        ("row-3", 2, False),
    ]
    counts = tokenizer.counts
    assert (counts.examples, counts.skipped_empty, counts.truncated, counts.tokens) == (2, 2, 1, 5)


def test_chunks_are_bounded_and_the_last_one_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 10)
    made = list(chunks(iter([document(i, 4) for i in range(5)])))
    assert [(len(c.documents), c.last) for c in made] == [(2, False), (2, False), (1, True)]


def test_an_empty_source_is_one_last_window_without_documents():
    assert list(chunks(iter(()))) == [Chunk((), last=True)]


@pytest.mark.parametrize("breaks", [(), (2,), (1, 4), (5,), (2, 9)])
def test_chunks_end_at_breaks_and_hold_everything(breaks: tuple[int, ...]):
    given = [document(i, 4) for i in range(5)]
    made = list(chunks(iter(given), breaks))
    ends = [0, *(place for place in breaks if place < 5), 5]
    assert [list(chunk.documents) for chunk in made] == [given[a:b] for a, b in pairwise(ends)]
    assert [chunk.last for chunk in made] == [False] * (len(made) - 1) + [True]


def test_reading_happens_in_another_thread_in_order():
    readers = set()

    def source() -> Iterator[Chunk]:
        for number in range(4):
            readers.add(threading.current_thread())
            yield Chunk((document(number, 1),), last=number == 3)

    assert [c.documents[0].example_id for c in Ahead(source())] == [0, 1, 2, 3]
    assert threading.main_thread() not in readers


def test_an_error_while_reading_reaches_the_reader():
    def source() -> Iterator[Chunk]:
        yield Chunk((), last=False)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(Ahead(source()))


def test_a_panic_while_reading_does_not_pass_by_those_who_save():
    class PanicError(BaseException):
        """As libraries written in Rust raise it."""

    def source() -> Iterator[Chunk]:
        raise PanicError("index out of bounds")
        yield

    with pytest.raises(DatasetError, match="PanicError: index out of bounds"):
        list(Ahead(source()))


def test_a_token_beyond_the_embedding_is_named_whichever_window_it_is_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK_DOCUMENTS", 1)
    for texts in (("abz", "ab"), ("ab", "abz")):
        feed = Feed(Texts(*texts), by_letter, 0, max_tokens=None)
        row = texts.index("abz")
        with pytest.raises(CheckpointError, match=f"document 'row-{row}' has token 122 at position 2, .* 122 rows"):
            feed.fit(ord("z"))
            list(feed.batches(100))
        feed.close()


def test_a_negative_token_is_named():
    feed = Feed(Texts("ab"), lambda text: np.array([5, -3, 7]), 0, max_tokens=None)
    with pytest.raises(CheckpointError, match="document 'row-0' has token -3 at position 1, .* 99 rows"):
        feed.fit(99)
    feed.close()


def test_closing_stops_the_reading():
    started = threading.Event()
    read: list[int] = []

    def source() -> Iterator[Chunk]:
        for number in range(10_000):
            read.append(number)
            started.set()
            yield Chunk((), last=False)

    ahead = Ahead(source())
    started.wait(5)
    ahead.close()
    ahead._thread.join(5)
    assert not ahead._thread.is_alive()
    assert len(read) < 10
