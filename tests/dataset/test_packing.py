"""Short texts packed into documents: all of them, once, in order, each a section."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sniffer.models.tokenizer import Tokenizer as Made

from sniffer.cli.plan import most_lengths
from sniffer.dataset.content import ChatFormat
from sniffer.dataset.feed import Feed
from sniffer.dataset.packages import Pydoc
from sniffer.dataset.packing import packed, packs
from sniffer.dataset.source import Shard, Source
from sniffer.dataset.tables import JsonLines
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import CheckpointError, ConfigError, DatasetError
from sniffer.hashing import key_of
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.verify import verify
from sniffer.types import Document
from tests.dataset.test_batching import Texts, by_letter
from tests.helpers_runs import ORDER, Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint, save_texts

EOS = 0


def text(number: int, n_tokens: int, ends: bool = False) -> Document:
    tokens = np.arange(1, n_tokens + 1, dtype=np.int32) + 100 * number
    if ends:
        tokens[-1] = EOS
    return Document(number, f"t{number}", tokens, False)


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12)


@given(LENGTHS, st.integers(9, 30), st.sampled_from([None, EOS]))
def test_every_text_is_in_one_document_whole_and_in_order(texts: list[Any], longest: int, separator: int | None):
    made = [text(number, *one) for number, one in enumerate(texts)]
    documents = [packed(some, separator) for some in packs(iter(made), longest, separator)]
    assert all(document.n_tokens <= longest for document in documents)
    found: list[str] = []
    for document in documents:
        assert document.sections is not None
        spans = document.sections.spans()
        # Between two spans there is a separator or nothing, before the first and behind the last nothing.
        expected = []
        for (start, end, name), one in zip(spans, made[len(found) :], strict=False):
            assert name == one.source_id and document.token_ids[start:end].tolist() == one.token_ids.tolist()
            expected += [*([EOS] if expected and separator is not None and expected[-1] != EOS else []), *one.token_ids]
        assert document.token_ids.tolist() == expected
        found += [name for *_, name in spans]
    assert found == [one.source_id for one in made]
    # No document had room for the text that comes next.
    for document, after in zip(documents, documents[1:], strict=False):
        assert after.sections is not None and document.sections is not None
        first = made[found.index(after.sections.spans()[0][2])].n_tokens
        ends = separator is None or document.token_ids[-1] == EOS
        assert document.n_tokens + (not ends) + first > longest


def test_a_document_is_known_by_its_texts():
    one, two, three = text(1, 4), text(2, 3), text(3, 5)
    alone, both, all_ = packed([one], EOS), packed([one, two], EOS), packed([one, two, three], None)
    assert (alone.example_id, alone.source_id) == (1, "t1") and alone.token_ids.tolist() == one.token_ids.tolist()
    assert (both.source_id, all_.source_id) == ("t1+1", "t1+2")
    assert both.example_id == key_of("pack", 1, 2) >> 1 == packed([one, two], None).example_id
    assert len({alone.example_id, both.example_id, all_.example_id, packed([two, one], EOS).example_id}) == 4
    assert packed([one, replace(two, truncated=True)], EOS).truncated


def test_an_id_that_reads_like_a_packed_one_is_refused():
    with pytest.raises(DatasetError, match=r"'a\+3': its id ends as ids of packed texts do"):
        packed([replace(text(1, 3), source_id="a+3")], None)
    assert packed([replace(text(1, 3), source_id="a+b")], None).source_id == "a+b"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"pack_to": 0}, "pack_to=0"),
        ({"pack_to": 9, "window": 5}, "both say how long documents are"),
        ({"pack_to": 9, "min_tokens": 10}, "more than the 9"),
        ({"pack_separator": "bos"}, "pack_separator=bos is not one of eos, none, or a token id"),
        ({"pack_separator": -1}, "pack_separator=-1"),
        ({"pack_separator": True}, "pack_separator=True"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        Pydoc(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"spans_column": "a"},
        {"text_column": ["a", "b"]},
        {"tokens_column": "a", "labels_column": "b"},
        {"messages_column": "a"},
    ],
)
def test_a_token_has_one_section(keys: dict[str, Any]):
    with pytest.raises(ConfigError, match="makes each text a section, and its tokens have others already"):
        JsonLines(path="x", pack_to=9, **keys)
    assert JsonLines(path="x", pack_to=9, messages_column="a", chat=ChatFormat(sections=False)).has_sections


def test_a_tokenizer_without_an_end_of_texts_is_told_at_once():
    class Packed(Texts):
        pack_to = 9

    with pytest.raises(CheckpointError, match=r"pack_separator=eos: .*pack_separator=none, or to the id of a token"):
        Tokenizer(by_letter, None).documents(Packed("abc"))


TEXTS = {f"doc-{n}": ("the cat sat " * (n * 7 % 5 + 1))[: 20 + n] if n % 6 else " " for n in range(40)}
PACKED = ("dataset.pack_to=100", "dataset.pack_separator=7")


class Ending(Made):
    """The tokenizer of the tests, with an end."""

    ending = 9


def source(place: Path, **keys: Any) -> Source:
    return JsonLines(path=str(save_texts(place / "texts.jsonl", TEXTS)), id_column="id", **keys)


def test_eos_is_the_separator_by_default(tmp_path: Path):
    class Letters:
        ending = 9

        def __call__(self, text: str) -> np.ndarray:
            return by_letter(text)

    documents = list(Tokenizer(Letters(), None).documents(source(tmp_path, pack_to=100)))
    several = [document for document in documents if "+" in document.source_id]
    assert several and all(
        (document.token_ids == 9).sum() == int(document.source_id.split("+")[1]) for document in several
    )
    bare = list(Tokenizer(Letters(), None).documents(source(tmp_path, pack_to=100, pack_separator="none")))
    assert not any((document.token_ids == 9).any() for document in bare)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_shards_have_the_documents_and_counts_of_the_whole(tmp_path: Path, count: int):
    keys: dict[str, Any] = {"pack_to": 60, "pack_separator": 7, "max_tokens": 30, "min_tokens": 22}
    whole = Tokenizer(by_letter, 30)
    documents = list(whole.documents(source(tmp_path, **keys)))
    shards = [Tokenizer(by_letter, 30) for _ in range(count)]
    found = [list(one.documents(source(tmp_path, **keys, shard=Shard(n, count)))) for n, one in enumerate(shards)]
    for n, mine in enumerate(found):
        assert [d.source_id for d in mine] == [d.source_id for d in documents[n::count]]
        assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(mine, documents[n::count], strict=True))
    total = {name: sum(one.counts.left_out().get(name, 0) for one in shards) for name in whole.counts.left_out()}
    assert total == whole.counts.left_out() and {"dropped", "skipped_empty", "skipped_short"} <= total.keys()
    assert sum(one.counts.examples for one in shards) == whole.counts.examples == len(documents)


def test_a_plan_expects_as_many_documents_as_there_may_be(tmp_path: Path):
    made = source(tmp_path, pack_to=100, max_tokens=30, max_examples=10)
    assert most_lengths(made) == [3 * 30 + 2, 3 * 30 + 2, 3 * 30 + 2, 30]
    assert most_lengths(replace(made, shard=Shard(1, 2))) == [92, 30]
    assert most_lengths(replace(made, pack_to=20)) == [20] * 10


def test_a_feed_expects_documents_from_those_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sniffer.dataset.feed.CHUNK_DOCUMENTS", 3)
    texts = {f"doc-{n}": "abcdefghi" for n in range(40)}
    made = JsonLines(path=str(save_texts(tmp_path / "a.jsonl", texts)), id_column="id", pack_to=40, pack_separator=7)
    feed = Feed(made, by_letter, 0, max_tokens=None)
    assert (len(feed.first.documents), feed.first.last, feed.expected_documents) == (3, False, 10)
    feed.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("packing")
    return Runs(save_checkpoint(place / "model"), save_texts(place / "texts.jsonl", TEXTS), place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.start("whole", *PACKED)


def test_a_run_of_packed_texts_names_the_source_of_each_row(whole: Path, runs: Runs):
    manifest, problems = verify(whole)
    run = open_run(whole)
    assert problems == [] and isinstance(run, Run)
    assert manifest.counts["skipped_empty"] == 7 and set(run.sections) == {
        name for name in TEXTS if TEXTS[name].strip()
    }
    listed = {
        name: (start, end) for spans in run.examples()["sections"] for start, end, name in map(dict.values, spans)
    }
    alone = open_run(runs.start("alone", "sampler.base_rate=1000")).scan(layers=[0], kinds=["k"]).filter(head=0)
    sources = open_run(runs.place / "alone").examples().select("example_id", "source_id")
    tokens = {
        name[0]: some.sort("position")["token_id"].to_list()
        for name, some in alone.collect().join(sources, on="example_id").group_by("source_id")
    }
    for position, token, section in run.scan().select("position", "token_id", "section").collect().unique().iter_rows():
        assert token == (7 if not section else tokens[section][position - listed[section][0]])


@pytest.mark.long
@pytest.mark.parametrize("batches", [1, 3])
def test_a_stopped_run_is_completed_exactly(runs: Runs, batches: int):
    small = ("batch.max_tokens=100", "output.checkpoint_every=2")
    folder = runs.start(f"stopped-{batches}", *PACKED, *small, stop_after=batches)
    assert verify(folder)[1] == [] and take_up(folder)
    must_be_whole(folder, runs.start(f"never-{batches}", *PACKED, *small))


@pytest.mark.parametrize("count", [2, 30])
def test_shards_are_the_whole(runs: Runs, count: int):
    """Some of them without any document, where there are more shards than documents."""
    small = (*PACKED, "batch.max_tokens=100")
    shards = [
        runs.start(f"shard-{count}-{n}", *small, f"dataset.shard.count={count}", f"dataset.shard.index={n}")
        for n in ((0, 1) if count == 2 else (0, 29))
    ]
    assert [verify(shard)[1] for shard in shards] == [[], []]
    if count == 2:
        alone = rows(runs.start("once", *small))
        assert pl.concat(map(rows, shards)).sort(ORDER).drop("vector").equals(alone.drop("vector"))


def test_a_pack_beyond_the_models_positions_is_refused(runs: Runs):
    with pytest.raises(ConfigError, match=r"dataset\.pack_to=4096 is more than the model's 2048 positions"):
        runs.start("long", "dataset.pack_to=4096")


def test_token_ids_are_packed_too(runs: Runs, tmp_path: Path):
    ids = [{"id": f"doc-{n}", "ids": [5 + n] * (n + 1)} for n in range(6)]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ids))
    given = (f"dataset.path={tmp_path / 'ids.jsonl'}", "dataset.tokens_column=ids", "dataset.pack_to=12")
    with pytest.raises(CheckpointError, match="pack_separator=none"):
        runs.start("ids-eos", *given)
    folder = runs.start("ids", *given, "dataset.pack_separator=none", "sampler.base_rate=1000")
    assert verify(folder)[1] == []
    found = rows(folder).filter(layer=0, kind="q", head=0)
    assert {section: set(some["token_id"]) for (section,), some in found.group_by("section")} == {
        f"doc-{n}": {5 + n} for n in range(6)
    }
