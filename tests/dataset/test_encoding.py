"""What becomes of a text's beginning: one, as the dataset wants it, and never two."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sniffer.models.tokenizer import Tokenizer as Made
from transformers import AutoTokenizer

from sniffer.dataset.encoding import Encoder, tokenizer_for
from sniffer.dataset.packages import Pydoc
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import CheckpointError, ConfigError
from sniffer.runs.verify import verify
from tests.dataset.test_batching import Texts, by_letter
from tests.helpers_runs import Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint, save_texts, save_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encoding")
    save_tokenizer(place / "adds")
    save_tokenizer(place / "adds-none", adds=False)
    return place


@pytest.fixture(scope="module")
def tokenizers(place: Path) -> dict[str, Made]:
    return {name: Made(AutoTokenizer.from_pretrained(place / name)) for name in ("adds", "adds-none")}


@pytest.mark.parametrize(
    ("name", "special", "text", "beginnings", "begun"),
    [
        ("adds", "auto", "ab", 1, 0),
        ("adds", "auto", "<s>ab", 1, 1),
        ("adds", "auto", "<s><s>ab", 2, 1),  # as the text has them
        ("adds", "add", "ab", 1, 0),
        ("adds", "add", "<s>ab", 1, 1),
        ("adds", "none", "ab", 0, 0),
        ("adds", "none", "<s>ab", 1, 0),
        ("adds-none", "auto", "ab", 0, 0),
        ("adds-none", "auto", "<s><s>ab", 2, 0),
        ("adds-none", "add", "ab", 1, 0),
        ("adds-none", "add", "<s>ab", 1, 0),
        ("adds-none", "none", "ab", 0, 0),
    ],
)
def test_a_text_has_one_beginning(
    tokenizers: dict[str, Made], name: str, special: str, text: str, beginnings: int, begun: int
):
    encoder = Encoder(tokenizers[name], special)
    ids = encoder.ids(text).tolist()
    letters = tokenizers[name].without_special("ab").tolist()
    assert ids == [0] * beginnings + letters and encoder.begun == begun


@pytest.mark.long
@given(st.text(min_size=1), st.sampled_from(["adds", "adds-none"]))
def test_auto_is_what_the_tokenizer_does(tokenizers: dict[str, Made], text: str, name: str):
    if text.strip() and not text.startswith("<s>"):
        assert Encoder(tokenizers[name]).ids(text).tolist() == tokenizers[name](text).tolist()


def test_an_empty_text_is_empty_whatever_would_be_added(tokenizers: dict[str, Made]):
    assert all(not len(Encoder(tokenizers["adds"], special).ids(" \n")) for special in ("auto", "add", "none"))


def test_what_a_tokenizer_cannot_do_is_one_line():
    with pytest.raises(ConfigError, match="special_tokens=some is not one of auto, add, none"):
        Pydoc(special_tokens="some")
    dataset: Any = Texts("ab")
    for dataset.special_tokens in ("add", "none"):
        with pytest.raises(CheckpointError, match="plain function"):
            list(Tokenizer(by_letter, None).documents(dataset))

    class NoBeginning:
        beginning = None
        __call__ = without_special = staticmethod(by_letter)

    with pytest.raises(CheckpointError, match="has no token for a beginning"):
        Encoder(NoBeginning(), "add")


@pytest.fixture(scope="module")
def runs(place: Path) -> Runs:
    texts = {"plain": "the cat sat on the mat " * 9, "begun": "<s>a dog ran over the hill " * 7, "c": "<s>short"}
    return Runs(save_checkpoint(place / "model"), save_texts(place / "texts.jsonl", texts), place)


def test_a_run_says_which_texts_brought_their_own_and_goes_on_as_it_began(runs: Runs, caplog: Any):
    source = f"model.tokenizer={runs.place / 'adds'}"
    whole = runs.start("whole", source)
    manifest = verify(whole)[0]
    assert manifest.counts["begun"] == 2 and "2 texts bring their own token of the beginning" in caplog.text
    assert manifest.model["tokenizer"]["source"] == str(runs.place / "adds")
    folder = runs.start("stopped", source, "batch.max_tokens=100", "output.checkpoint_every=1", stop_after=1)
    assert take_up(folder)
    must_be_whole(folder, runs.start("again", source, "batch.max_tokens=100"))
    firsts = rows(whole).filter(position=0)
    assert set(firsts["token_id"]) == {0} and 0 not in set(rows(whole).filter(position=1)["token_id"])


def test_the_same_tokens_by_any_setting_give_the_same_vectors(runs: Runs):
    """A tokenizer that adds a beginning, and one that is told to."""
    one = runs.start("added", f"model.tokenizer={runs.place / 'adds'}")
    other = runs.start("told", f"model.tokenizer={runs.place / 'adds-none'}", "dataset.special_tokens=add")
    assert rows(one).equals(rows(other))
    assert verify(other)[0].dataset["special_tokens"] == "add"


def test_a_folder_of_weights_without_a_tokenizer_is_no_dead_end(runs: Runs, tmp_path: Path):
    for file in runs.checkpoint.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    bare = Runs(tmp_path, runs.texts, tmp_path)
    with pytest.raises(CheckpointError, match="model.tokenizer takes that of another"):
        bare.start("refused")
    assert verify(bare.start("with", f"model.tokenizer={runs.checkpoint}"))[1] == []
    with pytest.raises(CheckpointError, match="is neither a local folder nor a hub id"):
        bare.start("nowhere", "model.tokenizer=/no/such/folder")


@pytest.mark.parametrize("name", ["load_tokenizer", "tokenizer"])
def test_a_checkpoint_of_ones_own_may_have_either_name(name: str):
    """The second is what early releases asked for."""
    model = SimpleNamespace(**{name: lambda: (str.split, 7)})
    assert tokenizer_for(SimpleNamespace(), model) == (str.split, 7)  # type: ignore[arg-type]
