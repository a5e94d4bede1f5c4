"""Needles in haystacks: texts as long and as deep as said, made of the hay, the same wherever they are made."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from sniffer.models.tokenizer import Tokenizer as Made
from transformers import AutoTokenizer

from sniffer.config.resolve import conf_folder, register, resolve
from sniffer.config.trust import Trust
from sniffer.dataset import Niah, Pydoc
from sniffer.dataset.content import ChatFormat
from sniffer.dataset.encoding import Encoder
from sniffer.dataset.source import Shard
from sniffer.dataset.tables import JsonLines
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import CheckpointError, ConfigError, DatasetError
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.card import TEXT_LICENCES, Place, card
from sniffer.runs.reproduce import reproduce
from sniffer.runs.verify import verify
from sniffer.types import Chat, SectionedText
from tests.dataset.test_batching import Texts
from tests.helpers_runs import ORDER, Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint, save_texts, save_tokenizer


class Hay(Texts):
    """Texts of somebody's own dataset."""

    title = "some hay"

    def check(self) -> None:
        assert self.rows


HAY = Hay(
    *(
        " ".join(f"Word{n}x{i}{'.' if i % 7 == 6 else ''}" for i in range(40 + 13 * n))
        + ("\n\nA line" if n % 2 else "")
        for n in range(12)
    ),
    "   ",
)
WORDS = [word for text in HAY.rows for word in text.split()]
KINDS = ("single", "multi_key", "multi_value")


def niah(**keys: Any) -> Niah:
    return Niah(**{"hay": HAY, "lengths": 200, "depths": 0.5, **keys})


def made(**keys: Any) -> dict[str, SectionedText | Chat]:
    dataset = niah(**keys)
    dataset.check()
    return {source_id: content for _, source_id, content in dataset.texts()}  # type: ignore[misc]


def pieces(content: SectionedText | Chat) -> list[tuple[str, str]]:
    assert isinstance(content, SectionedText)
    return [(content.text[start:end], name) for start, end, name in content.spans]


def of(content: SectionedText | Chat, *names: str) -> list[str]:
    return [text for text, name in pieces(content) if name in names]


@pytest.mark.long
@given(
    st.sampled_from(KINDS),
    st.integers(90, 700),
    st.floats(0, 1),
    st.integers(2, 6),
    st.integers(0, 3),
    st.integers(0, 1 << 40),
)
def test_a_text_is_as_long_and_as_deep_as_said(
    kind: str, length: int, depth: float, needles: int, number: int, seed: int
):
    found = made(kinds=kind, lengths=length, depths=depth, needles=needles, examples=number + 1, seed=seed)
    content = found[f"{kind}/{length}/{depth + 0.0!r}/{number}"]
    assert isinstance(content, SectionedText) and len(content.text.split()) == length
    hay = "".join(of(content, "hay")).split()
    # The hay is a stretch of the ring, word for word.
    twice = WORDS + WORDS
    assert any(twice[at : at + len(hay)] == hay for at in range(len(WORDS)))
    # The needle asked for is where it is to be, in the words of the hay.
    before, depths = 0, []
    for text, name in pieces(content):
        if name == "hay":
            before += len(text.split())
        elif name == "needle":
            depths.append(before / len(hay))
    assert min(abs(one - depth) for one in depths) <= 0.05 + 0.5 / len(hay)
    if kind == "multi_key":
        assert len(of(content, "distractor")) == needles - 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_what_the_needles_say(kind: str):
    for content in made(kinds=kind, depths=[0, 0.3, 1], examples=4, needles=5).values():
        (question,), (answer,) = of(content, "question"), of(content, "answer")
        said = [re.search(r"of ([a-z]+-[a-z]+) is (\d{7})\.$", text) for text in of(content, "needle")]
        names = {one[1] for one in said if one}
        (name,) = names
        assert f"of {name}?" in question and f"of {name} " in answer
        assert re.findall(r"\d+", answer) == [one[2] for one in said if one]
        others = [re.findall(r"of (\S+) is (\d{7})\.$", text)[0] for text in of(content, "distractor")]
        assert len({*names, *(one for one, _ in others)}) == 1 + len(others) == (5 if kind == "multi_key" else 1)
        assert len(said) == (5 if kind == "multi_value" else 1)
        values = re.findall(r"\d{7}", "".join(of(content, "needle", "distractor")))
        assert len(set(values)) == len(values)


def test_sections_are_all_of_the_text_but_the_lines_between():
    for content in made(kinds=list(KINDS), depths=[0, 0.5, 1], examples=3).values():
        assert isinstance(content, SectionedText)
        rest, begin = [], 0
        for start, end, _ in content.spans:
            rest.append(content.text[begin:start])
            begin = end
        assert begin == len(content.text) and [blank for blank in rest if blank] == ["\n\n", "\n"]


def test_depths_0_and_1_are_the_ends_of_the_hay():
    first, last = made(depths=[0, 1]).values()
    assert [name for _, name in pieces(first)] == ["needle", "hay", "question", "answer"]
    assert [name for _, name in pieces(last)] == ["hay", "needle", "question", "answer"]
    assert "".join(of(first, "hay")).split() == "".join(of(last, "hay")).split()


def test_needles_stand_between_sentences_where_these_are_near():
    for content in made(lengths=400, depths=[0.2, 0.4, 0.6], examples=5).values():
        before = pieces(content)[0][0]
        # Sentences of seven words, in a hay of 379: one always ends within a twentieth.
        assert before.endswith(".") or before.endswith("A line")
    bare = made(hay=Hay("no end of it " * 300), depths=0.31, lengths=221)
    assert len(pieces(next(iter(bare.values())))[0][0].split()) == 62


@pytest.mark.long
def test_a_text_does_not_depend_on_the_rest_of_the_grid():
    grid = made(kinds=list(KINDS), lengths=[90, 200, 300], depths=[0, 0.5, 1], examples=3)
    assert len(grid) == 3 * 3 * 3 * 3
    for kind in KINDS:
        alone = made(kinds=[kind], lengths=200, depths=[1, 0.5], examples=2)
        assert alone and all(grid[name] == content for name, content in alone.items())
    keys: dict[str, Any] = {"kinds": list(KINDS), "lengths": [200], "depths": [0, 0.5, 1], "examples": 3}
    for more in ({"shard": Shard(1, 2)}, {"max_examples": 5, "shuffle_seed": 3}, {"max_examples": 4}):
        some = made(**keys, **more)
        assert 0 < len(some) < 27 and all(grid[name] == content for name, content in some.items())


def test_cells_differ_by_what_they_are_called_alone():
    grid = made(kinds=["single", "multi_key"], lengths=[100, 300], depths=[0.2, 0.7], examples=3)
    for number in range(3):
        mine = [content for name, content in grid.items() if name.endswith(f"/{number}")]
        assert len({of(content, "answer")[0] for content in mine}) == 1
        hays = sorted((" ".join("".join(of(content, "hay")).split()) for content in mine), key=len)
        assert all(hays[-1].startswith(hay) for hay in hays)
    assert len({of(content, "answer")[0] for content in grid.values()}) == 3
    assert made(seed=1) != made(seed=0)
    fewer, more = (of(next(iter(made(kinds="multi_key", needles=n).values())), "distractor") for n in (3, 5))
    assert set(fewer) < set(more)


def test_these_are_the_texts_for_ever():
    """A change of them is a change of what old runs say they were."""
    (content,) = made(lengths=36, depths=0.5, seed=7).values()
    assert isinstance(content, SectionedText)
    assert content.text == GOLDEN


GOLDEN = (
    "Word1x14 Word1x15 Word1x16 Word1x17 Word1x18 Word1x19 Word1x20. The secret number of gentle-nectar is 4620542. "
    "Word1x21 Word1x22 Word1x23 Word1x24 Word1x25 Word1x26 Word1x27. Word1x28\n\n"
    "What is the secret number of gentle-nectar?\nThe secret number of gentle-nectar is 4620542."
)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"depths": [0, 1.5]}, r"dataset\.depths has 1\.5: wanted numbers from 0"),
        ({"depths": -0.1}, r"depths has -0\.1"),
        ({"depths": float("nan")}, "depths has nan"),
        ({"depths": [0.5, 0.5]}, "each once"),
        ({"depths": []}, "some values"),
        ({"lengths": [200, 21]}, "lengths has 21, and needles, question and answer of single have 21 words alone"),
        ({"lengths": 1.5}, "lengths has 1.5: wanted numbers of words"),
        ({"kinds": "triple"}, "kinds has triple: choose from single, multi_key, multi_value"),
        ({"examples": 0}, "examples=0"),
        ({"needles": 1}, "needles=1 must be from 2 to 1024"),
        ({"chat": 3}, "chat=3 must be true, false, or a chat template"),
        ({"chat": True, "special_tokens": "none"}, "special_tokens=none is for texts"),
        ({"pack_to": 99}, "pack_to=99 makes each text a section"),
        ({"hay": Pydoc(window=9)}, r"dataset\.hay\.window counts tokens"),
        ({"hay": Pydoc(shard=Shard(0, 2))}, r"dataset\.hay\.shard"),
        ({"hay": JsonLines(path="x", messages_column="m")}, r"dataset\.hay\.messages_column: hay is made of texts"),
        ({"hay": None}, r"dataset@dataset\.hay=text"),
        ({"hay": Niah(hay=HAY)}, "niah itself"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(keys: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        niah(**keys)


def test_hay_that_cannot_be_is_told_before_anything_is_made(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"has 1,350 words of hay, fewer than the 1,379 that dataset\.lengths=1400"):
        niah(lengths=[100, 1400]).check()
    niah(lengths=len(WORDS) + 21).check()
    with pytest.raises(DatasetError, match=r"^dataset\.hay\.path=.*no such file"):
        niah(hay=JsonLines(path=str(tmp_path / "none.jsonl"))).check()
    (tmp_path / "a.jsonl").write_text(json.dumps({"m": "one two"}) + "\n")
    with pytest.raises(DatasetError, match=r"such as with dataset\.hay\.text_column"):
        niah(hay=JsonLines(path=str(tmp_path / "a.jsonl"))).check()
    chats = Hay(Chat(({"role": "user", "content": "hi"},)))  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="is no text: hay is made of texts"):
        niah(hay=chats).check()


def test_hay_that_has_the_name_of_a_needle_is_refused():
    (content,) = made().values()
    name = of(content, "question")[0].split()[-1].rstrip("?")
    with pytest.raises(DatasetError, match=f"has '{name}', the name of a needle, in the hay of single/200/0.5/0"):
        made(hay=Hay(f"we met {name} " * 99))


def test_a_text_that_would_be_cut_is_refused(tmp_path: Path):
    dataset, tokenizer = niah(max_tokens=300), Made(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path)))
    with pytest.raises(DatasetError, match=r"'single/200/0\.5/0' has .* tokens, more than the 300"):
        list(Tokenizer(tokenizer, 300).documents(dataset))


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_sections_of_the_text(kind: str, tmp_path: Path):
    template = tmp_path / "own.jinja"
    template.write_text(TEMPLATE)
    tokenizer = Made(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "tokenizer")))
    keys: dict[str, Any] = {"kinds": kind, "depths": [0, 0.4, 1], "examples": 2}
    plain, chats = niah(**keys), niah(**keys, chat=str(template))
    for dataset in (plain, chats):
        dataset.check()
    encoder = Encoder.of(chats, tokenizer)
    for text, chat in zip(plain.texts(), chats.texts(), strict=True):
        assert text[:2] == chat[:2] and isinstance(chat[2], Chat) and isinstance(text[2], SectionedText)
        ids, sections = encoder.encoded(chat[2], chat[1])
        assert sections is not None and len(sections) == len(ids)
        # A token is a byte: stretches of tokens are those of the characters, all of which are ASCII.
        written = tokenizer.rendered(chat[2])
        found: dict[str, str] = {}
        for start, end, name in sections.spans():
            found[name] = found.get(name, "") + written[start:end]
        expected: dict[str, str] = {}
        for piece, name in pieces(text[2]):
            expected[name] = expected.get(name, "") + piece
        assert {name: found[name] for name in expected} == expected
        assert found.keys() - expected.keys() == {"user", "template"} and found["user"] == "\n\n"
        assert "".join(written.split("<|end|>\n")[0].split("\n", 1)[1]) == text[2].text.rsplit("\n", 1)[0]


def test_a_tokenizer_without_a_template_is_told_by_the_key_of_this_dataset(tmp_path: Path):
    tokenizer = Made(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path)))
    with pytest.raises(
        CheckpointError, match=r"dataset\.chat: .* give one with dataset\.chat=FILE, or take dataset\.chat=false"
    ):
        Encoder.of(niah(chat=True), tokenizer)
    assert niah(chat=True).chat_format == ChatFormat() and niah().chat_format is None


def test_a_template_that_loses_the_sections_is_told_by_the_key_of_this_dataset(tmp_path: Path):
    """One that counts what a message says cannot be followed; chats of other datasets may do without sections."""
    (tmp_path / "counts.jinja").write_text(
        "{% for m in messages %}{{ m.content | length }}:{{ m.content }}{% endfor %}"
    )
    tokenizer = Made(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path)))
    dataset = niah(chat=str(tmp_path / "counts.jinja"))
    with pytest.raises(DatasetError, match=r"cannot be told; take dataset\.chat=false for plain text") as raised:
        list(Tokenizer(tokenizer, None).documents(dataset))
    assert "chat.sections" not in str(raised.value)


def test_it_describes_its_design_and_its_hay():
    described = niah(hay=Pydoc(max_examples=3), kinds=["multi_value"], depths=1).describe()
    assert described["_target_"] == "sniffer.dataset.Niah"
    assert described["hay"]["_target_"] == "sniffer.dataset.Pydoc" and described["hay"]["documents"] == 3
    sentences = described["design"]["sentences"]
    assert sentences["multi_value"]["needle"] == "One of the secret numbers of {key} is {value}."
    assert (described["kinds"], described["lengths"], described["depths"]) == (["multi_value"], [200], [1.0])
    assert json.loads(json.dumps(described)) == described


class Niahs(Runs):
    """Runs over needles in the texts of a file."""

    def words(self) -> list[str]:
        return [
            *("model=checkpoint", f"model.checkpoint={self.checkpoint}", "model.device=cpu", "dataset=niah"),
            *("dataset@dataset.hay=jsonl", f"dataset.hay.path={self.texts}", "dataset.hay.id_column=id"),
            *("sampler=per_side", "sampler.q.keep_sections=[question]", "batch.max_tokens=1500"),
            *("dataset.kinds=[single,multi_key]", "dataset.lengths=[60,90]", "dataset.depths=[0,0.5]"),
        ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Niahs:
    place = tmp_path_factory.mktemp("niah")
    return Niahs(save_checkpoint(place / "model"), save_texts(place / "texts.jsonl"), place)


@pytest.fixture(scope="module")
def whole(runs: Niahs) -> Path:
    return runs.start("whole")


def test_queries_of_every_question_are_kept(whole: Path):
    manifest, problems = verify(whole)
    run = open_run(whole)
    assert problems == [] and isinstance(run, Run)
    assert set(run.sections) == {"hay", "needle", "distractor", "question", "answer"}
    found = rows(whole).filter(layer=0, head=0)
    kept = found.filter(pl.col("kind") == "q", pl.col("section") == "question").group_by("example_id").len()
    questions = {
        name: sum(row["end"] - row["start"] for row in spans if row["label"] == "question")
        for name, spans in run.examples().select("example_id", "sections").iter_rows()
    }
    assert dict(kept.iter_rows()) == questions and len(questions) == 8
    assert found.filter(kind="k").height == manifest.counts["tokens"]
    assert set(run.examples()["source_id"]) == {
        f"{kind}/{length}/{depth}/0" for kind in ("single", "multi_key") for length in (60, 90) for depth in (0.0, 0.5)
    }
    assert TEXT_LICENCES["sniffer.dataset.Sotu"] not in card(manifest, Place("a/b"), None)
    ours = replace(manifest, dataset={**manifest.dataset, "hay": {"_target_": "sniffer.dataset.Sotu"}})
    assert TEXT_LICENCES["sniffer.dataset.Sotu"] in card(ours, Place("a/b"), None)


def test_a_stopped_run_is_completed_exactly_and_a_run_reproduced(runs: Niahs, whole: Path, tmp_path: Path):
    folder = runs.start("stopped", "output.checkpoint_every=2", stop_after=2)
    assert verify(folder)[1] == [] and take_up(folder)
    must_be_whole(folder, whole)
    assert reproduce(whole, tmp_path / "again", Trust())[0]


def test_shards_are_the_whole(runs: Niahs, whole: Path):
    shards = [runs.start(f"shard-{n}", "dataset.shard.count=2", f"dataset.shard.index={n}") for n in (0, 1)]
    assert [verify(shard)[1] for shard in shards] == [[], []]
    assert pl.concat(map(rows, shards)).sort(ORDER).drop("vector").equals(rows(whole).drop("vector"))


def test_a_file_of_hay_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    register()
    save_texts(tmp_path / "texts.jsonl")
    monkeypatch.chdir(tmp_path)
    words = ["dataset=niah", "dataset@dataset.hay=jsonl", "dataset.hay.path=texts.jsonl", "dataset.chat=own.jinja"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = resolve(compose("config", words))
        with pytest.raises(ConfigError, match=r"dataset\.hay\.path has no value"):
            resolve(compose("config", ["dataset=niah", "dataset@dataset.hay=text"]))
        with pytest.raises(ConfigError, match=r"dataset\.examples: .*Integer"):
            resolve(compose("config", ["dataset=niah", "dataset.examples=a"]))
    assert isinstance(config.dataset, Niah)
    assert config.dataset.hay.path == str(tmp_path / "texts.jsonl")
    assert config.dataset.chat == str(tmp_path / "own.jinja") and config.dataset.shard == Shard()
