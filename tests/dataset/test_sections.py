"""Sections of texts and tokens: told by spans, columns and labels, and exact to the character."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sniffer.models.tokenizer import Tokenizer as Made
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sniffer.dataset.encoding import Encoder
from sniffer.dataset.hub import Hub
from sniffer.dataset.source import Shard
from sniffer.dataset.spans import checked_spans
from sniffer.dataset.tables import Json, JsonLines, Parquet
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import CheckpointError, ConfigError, DatasetError
from sniffer.runs.verify import verify
from sniffer.types import NONE, Document, SectionedText, TokenBatch
from tests.dataset.test_batching import by_letter
from tests.dataset.test_content import write
from tests.helpers_runs import ORDER, Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint, save_tokenizer

CORPUS = ["the cat sat on the mat, naïve 東京 😀 and\n\n  b\u00a0c, e\u0301a  b"] * 3
LETTERS = " abe\n\u00a0ï東😀é\u0301"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_values() -> dict[str, int]:
    """Which byte each letter of the byte-level alphabet stands for (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def trained(model: Any, trainer: Any, pre: Any = None, post: Any = None, norm: Any = None) -> Made:
    backend = Backend(model)
    if pre is not None:
        backend.pre_tokenizer = pre
    if norm is not None:
        backend.normalizer = norm
    backend.train_from_iterator(CORPUS, trainer)
    if post is not None:
        backend.post_processor = post
    return Made(PreTrainedTokenizerFast(tokenizer_object=backend))


def byte_level(prefix: bool, trim: bool) -> Made:
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=ALPHABET, show_progress=False)
    pre, post = pre_tokenizers.ByteLevel(add_prefix_space=prefix), processors.ByteLevel(trim_offsets=trim)
    return trained(models.BPE(), trainer, pre, post)


BYTE_LEVEL = {f"prefix {p}, trimming {t}": byte_level(p, t) for p in (False, True) for t in (False, True)}


def spans_in(data: st.DataObject, text: str) -> list[tuple[int, int, str]]:
    """Some spans of a text, in order and without overlaps."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), unique=True, max_size=6)))
    found = [(start, end, f"s{n}") for n, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False))]
    return [span for span in found if data.draw(st.booleans())]


@pytest.mark.parametrize("which", BYTE_LEVEL)
@given(st.text(LETTERS, max_size=30), st.data())
def test_bytes_of_the_tokens_of_a_span_are_its_characters(which: str, text: str, data: st.DataObject):
    """The witness knows bytes only: which of them are of which token, and of which character."""
    spans = spans_in(data, text)
    made = BYTE_LEVEL[which]
    ids, found = Encoder(made, sections=True, by_characters=True).encoded(SectionedText(text, tuple(spans)))
    if not text.strip():
        assert len(ids) == 0
        return
    assert found is not None and ids.tolist() == made(text).tolist()
    values, tokens = byte_values(), made._made_by.convert_ids_to_tokens(ids.tolist())
    added = len("".join(tokens)) - len(text.encode())  # of a blank before the text
    owner = np.repeat(np.arange(len(tokens)), [len(token) for token in tokens])[added:]
    assert bytes(values[letter] for letter in "".join(tokens))[added:] == text.encode()
    character = np.repeat(np.arange(len(text)), [len(letter.encode()) for letter in text])
    expected = [NONE] * len(tokens)
    for token in range(len(tokens)):
        mine = set(character[owner == token].tolist())
        names = [name for start, end, name in spans if mine & set(range(start, end))]
        expected[token] = names[0] if names else NONE
    if which.startswith("prefix True") and expected and len(tokens[0]) == 1 and added:
        expected[0] = found.names.array[0]  # the blank alone stands for no byte of the text
    assert list(found.names.array) == expected


OTHERS = {
    "word pieces": (
        trained(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False),
            pre_tokenizers.BertPreTokenizer(),
            None,
            normalizers.BertNormalizer(),
        ),
        str.lower,
    ),
    "sentence pieces": (
        trained(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
            pre_tokenizers.Metaspace(),
        ),
        lambda piece: piece,
    ),
}


@pytest.mark.parametrize("which", OTHERS)
def test_other_tokenizers_have_the_words_of_a_span(which: str):
    made, told = OTHERS[which]
    text = "the cat sat on 東京 and the mat 😀 b"
    start = text.index("東京")
    spans = ((4, 7, "cat"), (start, start + 2, "city"), (text.index("😀"), text.index("😀") + 1, "face"))
    ids, found = Encoder(made, sections=True, by_characters=True).encoded(SectionedText(text, spans))
    assert found is not None
    pieces = np.array(
        [told(piece).replace("▁", "").removeprefix("##") for piece in made._made_by.convert_ids_to_tokens(ids)]
    )
    names = found.names.array
    assert ["".join(pieces[names == name]) for name in ("cat", "city", "face")] == ["cat", "東京", "😀"]
    assert "".join(pieces) == text.replace(" ", "")


@pytest.mark.parametrize("special", ["auto", "add", "none"])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_special_tokens_move_no_section(tmp_path: Path, special: str, begins: bool, adds: bool):
    made = Made(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, adds=adds)))
    text = ("<s>" if begins else "") + "ab東c"
    start = text.index("東")
    encoder = Encoder(made, special, sections=True, by_characters=True)
    ids, found = encoder.encoded(SectionedText(text, ((start, start + 1, "city"),)))
    assert ids.tolist() == Encoder(made, special).ids(text).tolist()
    assert found is not None and found.names.array.tolist() == [*[""] * (len(ids) - 4), *["city"] * 3, ""]


def test_a_tokenizer_that_does_not_say_its_offsets_is_refused():
    with pytest.raises(CheckpointError, match="sections of a text need a tokenizer that says which characters"):
        Encoder(by_letter, sections=True, by_characters=True)


@pytest.mark.parametrize(
    ("spans", "named"),
    [
        (
            [(0, 3, "a"), (2, 5, "b")],
            "the spans 'a', up to 3, and 'b', from 2, overlap: a token belongs to one section",
        ),
        ([(2, 2, "a")], "the span 2-2 'a' is empty"),
        ([(3, 2, "a")], "lies outside a text of 5 characters"),
        ([(-1, 2, "a")], "the span -1-2 'a' lies outside"),
        ([(0, 6, "a")], "the span 0-6 'a' lies outside"),
        ([(0, 1, "")], "has nothing where the name of a section should be"),
        ([(0, 1, "\ud800")], "half a character"),
        ([(0, 1, "a" * 2000)], "has 2,000 bytes, more than 1,024"),
    ],
)
def test_spans_that_cannot_be_are_one_line(spans: list[Any], named: str):
    with pytest.raises(DatasetError, match=f"^row 3 of x.*{named}") as caught:
        checked_spans(spans, 5, "row 3 of x")
    assert "\n" not in str(caught.value)
    assert checked_spans([(3, 5, "b"), (0, 3, "a")], 5, "x") == ((0, 3, "a"), (3, 5, "b"))


def test_a_span_that_no_token_stands_for_is_named():
    made, _ = OTHERS["word pieces"]
    encoder = Encoder(made, sections=True, by_characters=True)
    assert encoder.encoded(SectionedText("a  b", ((1, 3, "blanks"),)))[1] is not None
    with pytest.raises(DatasetError, match=r"document 'd': the tokenizer makes no token of the span 2-3 'mark'"):
        encoder.encoded(SectionedText("a \x01 b", ((2, 3, "mark"),)), "d")


ROWS = [
    {
        "id": f"doc-{n}",
        "text": "hay " * n + "naïve 東京" + " straw" * n,
        "spans": [{"start": 4 * n, "end": 4 * n + 8, "label": "needle"}] if n else None,
        "question": f"where {n}?",
        "doc": {"body": "on the 東 mat " * n},
        "ids": list(range(1, 30 + n)),
        "labels": ["a" if token % 3 else None for token in range(1, 30 + n)],
    }
    for n in range(5)
]


@pytest.fixture(params=[JsonLines, Json, Parquet, Hub])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    return write(tmp_path / "data", ROWS, request.param)


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("bytes"), adds=False)))


def labels(document: Document) -> list[str]:
    assert document.sections is not None
    return list(document.sections.names.array)


def test_spans_of_rows(table: Any, bytewise: Made):
    source = table(spans_column="spans")
    source.check()
    for row, document in zip(ROWS, Tokenizer(bytewise, None).documents(source), strict=True):
        n = row["id"][-1]
        inside = 13 if int(n) else 0
        before = len(("hay " * int(n)).encode())
        assert labels(document) == [""] * before + ["needle"] * inside + [""] * (document.n_tokens - before - inside)


def test_several_columns_are_sections_of_their_names(table: Any, bytewise: Made):
    source = table(text_column=["question", "doc.body"], text_separator=" | ")
    source.check()
    for row, document in zip(ROWS, Tokenizer(bytewise, None).documents(source), strict=True):
        question, body = row["question"].encode(), row["doc"]["body"].encode()
        assert document.token_ids.tolist() == bytewise(f"{row['question']} | {row['doc']['body']}").tolist()
        assert labels(document) == ["question"] * len(question) + [""] * 3 + ["doc.body"] * len(body)


def test_labels_of_token_ids(table: Any):
    source = table(tokens_column="ids", labels_column="labels")
    source.check()
    for row, document in zip(ROWS, Tokenizer(by_letter, 20).documents(source), strict=True):
        assert document.token_ids.tolist() == row["ids"][:20]
        assert labels(document) == [label or "" for label in row["labels"]][:20]


@pytest.mark.parametrize(
    ("row", "keys", "named"),
    [
        (
            {"spans": [{"start": 0, "end": 99, "label": "x"}]},
            {"spans_column": "spans"},
            "lies outside a text of 2 char",
        ),
        ({"spans": [{"start": 0, "end": 1}]}, {"spans_column": "spans"}, "has nothing where the name"),
        ({"spans": [{"start": 0.5, "end": 1, "label": "x"}]}, {"spans_column": "spans"}, "wanted start, end"),
        ({"spans": [{"start": False, "end": 1, "label": "x"}]}, {"spans_column": "spans"}, "wanted start, end"),
        ({"spans": ["x"]}, {"spans_column": "spans"}, "wanted start, end"),
        ({"spans": "x"}, {"spans_column": "spans"}, "has a str where its spans should be"),
        ({"ids": [1, 2], "labels": ["a"]}, {"tokens_column": "ids", "labels_column": "labels"}, "1 labels for its 2"),
        ({"ids": [1], "labels": None}, {"tokens_column": "ids", "labels_column": "labels"}, "a NoneType for its 1"),
        (
            {"ids": [1], "labels": [True]},
            {"tokens_column": "ids", "labels_column": "labels"},
            "has True where the name",
        ),
        ({"ids": [1], "labels": [0.5]}, {"tokens_column": "ids", "labels_column": "labels"}, "has 0.5 where the name"),
        ({"other": None}, {"text_column": ["text", "other"]}, "has null where its text should be"),
    ],
)
def test_a_row_that_is_wrong_is_named_before_any_model_loads(
    tmp_path: Path, row: dict[str, Any], keys: dict[str, Any], named: str
):
    good = {"id": "a", "text": "ab", "spans": [], "ids": [1], "labels": [3], "other": "x"}
    source = write(tmp_path, [good, {**good, "id": "b", **row}], JsonLines)(**keys)
    with pytest.raises(DatasetError, match=f"row 1 of .*{named}"):
        source.check()


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"labels_column": "a"}, "dataset.labels_column labels token ids"),
        ({"spans_column": "a", "tokens_column": "b"}, "spans_column is for texts, and dataset.tokens_column"),
        ({"text_column": ["a", "b"], "messages_column": "c"}, "is for texts, and dataset.messages_column"),
        ({"text_column": ["a", "b"], "spans_column": "c"}, "both say what the sections are"),
        ({"text_column": []}, "must be a column, or a list of several"),
        ({"text_column": ["a", "a"]}, "each once"),
        ({"text_column": 3}, "must be a column"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        JsonLines(path="x", **keys)


def test_columns_of_another_type_are_refused_before_reading(tmp_path: Path):
    for made in (Parquet, Hub):
        source = write(tmp_path, [{"id": "a", "text": "x", "n": [1.5], "ids": [1]}], made)
        for keys in ({"spans_column": "ids"}, {"tokens_column": "ids", "labels_column": "n"}):
            with pytest.raises(DatasetError, match=r"is of type .*, not lists of (spans|labels): set dataset\."):
                source(**keys).check()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("sections")
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Runs(save_checkpoint(place / "model"), place / "texts.jsonl", place)


SPANS = ("dataset.spans_column=spans", "batch.max_tokens=120")


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.start("whole", *SPANS)


def test_sections_change_no_row_but_name_it(runs: Runs, whole: Path):
    plain = runs.start("plain", "batch.max_tokens=120")
    assert rows(whole).drop("section").equals(rows(plain))
    manifests = [verify(folder) for folder in (whole, plain)]
    assert [problems for _, problems in manifests] == [[], []]
    assert manifests[0][0].digest != manifests[1][0].digest


def test_the_same_tokens_have_the_same_rows_however_they_came(runs: Runs):
    """As columns, as spans of the text they make up, and as ids with labels."""
    made = []
    for row in ROWS:
        text, question = f"{row['question']}\n\n{row['doc']['body']}", len(row["question"])
        spans = [{"start": 0, "end": question, "label": "question"}]
        if row["doc"]["body"]:
            spans.append({"start": question + 2, "end": len(text), "label": "doc.body"})
        ids = [token + 1 for token in _bytes_as_ids(text)]
        names = ["question"] * question + [None] * 2 + ["doc.body"] * (len(ids) - question - 2)
        made.append({**row, "text": text, "spans": spans, "ids": ids, "labels": names})
    (runs.place / "alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    alike = f"dataset.path={runs.place / 'alike.jsonl'}"
    columns = runs.start("columns", alike, "dataset.text_column=[question,doc.body]")
    spans = runs.start("spans", alike, "dataset.spans_column=spans")
    ids = runs.start("labels", alike, "dataset.tokens_column=ids", "dataset.labels_column=labels")
    wide = runs.start("wide", alike, "dataset.spans_column=spans", "dataset.window=1000")
    for other in (spans, ids, wide):
        assert rows(other).equals(rows(columns))
        assert verify(other)[0].digest == verify(columns)[0].digest and verify(other)[1] == []


def _bytes_as_ids(text: str) -> list[int]:
    """As the tiny model's vocabulary numbers them: the byte-level alphabet in order."""
    values = byte_values()
    numbers = {values[letter]: number for number, letter in enumerate(ALPHABET)}
    return [numbers[byte] for byte in text.encode()]


OPTIONS: dict[str, tuple[str, ...]] = {
    "spans": SPANS,
    "columns": ("dataset.text_column=[question,doc.body]", "dataset.min_tokens=12"),
    "labels": ("dataset.tokens_column=ids", "dataset.labels_column=labels"),
    "windows": (*SPANS, "dataset.window=30", "dataset.stride=10"),
    "spills": (*SPANS, "output.memory_limit=1kB"),
    "cut": (*SPANS, "dataset.max_tokens=20", "dataset.shuffle_seed=3", "dataset.max_examples=4"),
}


@pytest.mark.long
@pytest.mark.parametrize("how", OPTIONS)
def test_stopped_and_sharded_runs_are_the_whole(runs: Runs, how: str):
    given = OPTIONS[how]
    reference = runs.start(f"{how}-reference", *given)
    assert verify(reference)[1] == []
    stopped = runs.start(f"{how}-stopped", *given, "batch.max_tokens=50", "output.checkpoint_every=1", stop_after=2)
    assert verify(stopped)[1] == []
    assert take_up(stopped)
    must_be_whole(stopped, runs.start(f"{how}-again", *given, "batch.max_tokens=50"))
    shards = [
        runs.start(f"{how}-{n}", *given, "dataset.shard.count=2", f"dataset.shard.index={n}", "batch.max_tokens=50")
        for n in range(2)
    ]
    together, alone = pl.concat(map(rows, shards)).sort(ORDER), rows(stopped)
    assert together.drop("vector").equals(alone.drop("vector"))
    assert np.allclose(together["vector"].to_numpy(), alone["vector"].to_numpy(), rtol=1e-4, atol=1e-5)


def test_documents_with_sections_travel(runs: Runs, bytewise: Made):
    source = JsonLines(path=str(runs.texts), spans_column="spans", shard=Shard(0, 1))
    batch = TokenBatch(tuple(Tokenizer(bytewise, None).documents(source)), pad_id=0)
    again = pickle.loads(pickle.dumps(batch))
    assert [document.sections for document in again.documents] == [document.sections for document in batch.documents]


def test_a_section_that_changed_is_no_document_to_go_on_with(runs: Runs, tmp_path: Path):
    from sniffer.errors import RunError

    moved = [{**row, "spans": [{"start": 0, "end": 2, "label": "needle"}]} for row in ROWS]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = (*SPANS, f"dataset.path={texts}", "batch.max_tokens=50", "output.checkpoint_every=1")
    folder = runs.start("changed", *given, stop_after=2)
    texts.write_text("".join(json.dumps(row) + "\n" for row in moved))
    with pytest.raises(RunError, match=r"dataset\.(bytes|sha256)"):
        take_up(folder)
    assert take_up(folder, force=True)
