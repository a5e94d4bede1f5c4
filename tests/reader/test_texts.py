"""Token ids that a run keeps give back its texts, for tokenizers of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.reader.sweep import Sweep, open_run
from sniffer.runs.publish import assemble
from sniffer.runs.verify import verify
from sniffer.storage.manifest import Manifest
from tests.helpers_runs import Runs
from tests.tiny_run import TEXTS, save_checkpoint, save_texts

PLAIN = {**TEXTS, "fourth": "the dog sat on a hill"}
ODD = {**PLAIN, "fifth": "na\u00efve caf\u00e9 \U0001f600\n\n\t\u65e5\u672c\u8a9e  two  spaces , and\u2009more. "}


def byte_bpe() -> Any:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(PLAIN.values(), vocab_size=400, special_tokens=["<s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", pad_token="<s>")


def prefix_space() -> Any:
    """As SentencePiece does: a space before the text, blanks as a sign of their own, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    letters = sorted({*"".join(PLAIN.values()), "\u2581"} - {" "})
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", *bytes_, *letters, "th", "\u2581th"])}
    merges = [("t", "h"), ("\u2581", "th")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(strip)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>", pad_token="<s>")


def word_piece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = " ".join(PLAIN.values()).split()
    pieces = sorted({word[0] for word in words} | {f"##{letter}" for word in words for letter in word[1:]} | {"the"})
    vocabulary = {piece: number for number, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


PANEL = {
    "byte BPE": (byte_bpe, ODD),
    "prefix space": (prefix_space, ODD),
    "WordPiece": (word_piece, PLAIN),
    "slow, of bytes": (ByT5Tokenizer, ODD),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("texts")
    save_checkpoint(place / "checkpoint", vocab_size=512)
    return place


@pytest.fixture(scope="module")
def plain(place: Path) -> Run:
    return captured(place, "plain", PLAIN)


def captured(place: Path, name: str, texts: dict[str, str], *more: str) -> Run:
    place.mkdir(exist_ok=True)
    runs = Runs(place / "checkpoint", save_texts(place / f"{name}.jsonl", texts), place)
    found = open_run(runs.start(name, "capture.layers=[1]", "sampler.base_rate=20", *more))
    assert isinstance(found, Run)
    return found


@pytest.mark.parametrize("kind", PANEL)
def test_tokens_give_back_the_text(place: Path, kind: str) -> None:
    make, texts = PANEL[kind]
    folder, name = place / f"{kind} tokenizer", kind.replace(" ", "_").replace(",", "")
    make().save_pretrained(folder)
    run = captured(place, name, texts, f"model.tokenizer='{folder}'")
    ids = dict(run.examples().select("source_id", "example_id").iter_rows())
    independent = AutoTokenizer.from_pretrained(folder)
    whole, bare = run.texts(), run.texts(special_tokens=False)
    for source, text in texts.items():
        tokens = run.tokens(ids[source])
        assert tokens.dtype == np.int32 and tokens.tolist() == independent(text)["input_ids"]
        assert bare[ids[source]] == text
        assert whole[ids[source]] == independent.decode(tokens, clean_up_tokenization_spaces=False)
    some = run.texts([ids["third"]], tokenizer=independent, special_tokens=False)
    assert some == {ids["third"]: texts["third"]}
    assert not verify(run.folder)[1]
    rows = run.scan(token=True).select("example_id", "position", "token_id", "token").collect()
    assert len(rows)
    for example, position, token_id, token in rows.unique().iter_rows():
        assert token_id == run.tokens(example)[position] and token == independent.convert_ids_to_tokens(token_id)


def test_a_run_may_keep_no_tokens(place: Path, plain: Run) -> None:
    run = captured(place, "without", PLAIN, "output.tokens=false")
    assert run.manifest.digest == plain.manifest.digest and not (run.folder / "tokens").exists()
    assert not verify(run.folder)[1]
    with pytest.raises(RunError, match=r"has no token ids: output\.tokens=false"):
        run.tokens(0)
    with pytest.raises(RunError, match="has no token ids"):
        run.texts()


def test_what_is_not_there_is_named(plain: Run) -> None:
    with pytest.raises(RunError, match="123 is no document of"):
        plain.tokens(123)
    with pytest.raises(RunError, match="123 is no document with token ids"):
        plain.texts([123])


def test_a_tokenizer_that_is_gone_or_another_one_is_refused(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    byte_bpe().save_pretrained(folder)
    run = captured(place, "changing", PLAIN, f"model.tokenizer={folder}")
    assert Run(run.folder, run.manifest).texts(special_tokens=False)
    shutil.rmtree(folder)
    prefix_space().save_pretrained(folder)
    with pytest.raises(RunError, match="is not what it was when the run was made"):
        Run(run.folder, run.manifest).texts()
    shutil.rmtree(folder)
    with pytest.raises(RunError, match=r"is not at hand .*tokenizer=\.\.\."):
        Run(run.folder, run.manifest).scan(token=True)
    assert set(Run(run.folder, run.manifest).texts(tokenizer=byte_bpe()).values()) == set(PLAIN.values())


def test_code_of_a_run_is_not_run_for_its_tokenizer(plain: Run) -> None:
    model = {**plain.manifest.config["model"], "trust_remote_code": True}
    values = {**vars(plain.manifest), "config": {**plain.manifest.config, "model": model}}
    with pytest.raises(RunError, match="may run code of its own"):
        Run(plain.folder, Manifest(**values)).texts()


def test_shards_of_a_dataset_are_read_as_one(place: Path, plain: Run) -> None:
    for index in range(2):
        shard = f"dataset.shard.index={index}", "dataset.shard.count=2"
        captured(place / "shards", str(index), PLAIN, f"model.checkpoint={place / 'checkpoint'}", *shard)
    both = open_run(place / "shards")
    assert isinstance(both, Sweep) and both.texts() == plain.texts()
    for example in plain.examples()["example_id"]:
        assert both.tokens(example).tolist() == plain.tokens(example).tolist()
    key = ["layer", "kind", "head", "example_id", "position"]
    rows = [one.scan(token=True).select(*key, "token").sort(key).collect() for one in (plain, both)]
    assert rows[0].equals(rows[1]) and rows[0]["token"].null_count() == 0
    with pytest.raises(RunError, match="5 is no document of any job"):
        both.tokens(5)


def test_jobs_with_other_tokens_are_asked_one_by_one(place: Path) -> None:
    jobs = place / "jobs"
    for name, make in (("a", byte_bpe), ("b", prefix_space)):
        make().save_pretrained(jobs / f"{name}_tokenizer")
        tokenizer = f"model.tokenizer={jobs / f'{name}_tokenizer'}"
        captured(jobs, name, PLAIN, f"model.checkpoint={place / 'checkpoint'}", tokenizer)
    both = open_run(jobs)
    assert isinstance(both, Sweep)
    example = both.runs["a"].examples()["example_id"][0]
    with pytest.raises(RunError, match=r"other tokens in job b than in job a: ask sweep\.runs\['a'\]"):
        both.tokens(example)


def test_a_published_run_has_tokens_only_if_told_so(plain: Run, tmp_path: Path) -> None:
    assemble(plain.folder, tmp_path / "bare", "owner/name")
    bare = Run(tmp_path / "bare", Manifest.load(tmp_path / "bare"))
    assert not (bare.folder / "tokens").exists() and not verify(bare.folder)[1]
    assert bare.manifest.digest == plain.manifest.digest
    assert json.loads((bare.folder / "manifest.json").read_text())["config"]["output"]["tokens"] is False
    assemble(plain.folder, tmp_path / "full", "owner/name", tokens=True)
    full = Run(tmp_path / "full", Manifest.load(tmp_path / "full"))
    assert not verify(full.folder)[1]
    example = plain.examples()["example_id"][0]
    assert full.tokens(example).tolist() == plain.tokens(example).tolist()


def test_a_scan_without_asking_has_no_token(plain: Run) -> None:
    assert "token" not in plain.scan().collect_schema() and isinstance(plain.scan(), pl.LazyFrame)
