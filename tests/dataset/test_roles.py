"""Chats in sections: the roles, by token, as the template itself has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sniffer.models.tokenizer import Tokenizer as Made
from transformers import AutoTokenizer

from sniffer.dataset.content import ChatFormat
from sniffer.dataset.encoding import Encoder
from sniffer.dataset.roles import spans_of
from sniffer.dataset.tables import JsonLines
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import CheckpointError, DatasetError
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.verify import verify
from sniffer.types import Chat
from tests.dataset.test_batching import by_letter
from tests.helpers_runs import ORDER, Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint, save_tokenizer

Pieces = list[tuple[str, str]]
"""(text, section) one after the other: a rendered chat as plain Python makes it."""

Message = dict[str, Any]


def plain_pieces(messages: list[Message]) -> Pieces:
    """Every content as it is."""
    return [
        piece
        for message in messages
        for piece in (
            (f"<|{message['role']}|>\n", "template"),
            (message["content"], message["role"]),
            ("<|end|>\n", "template"),
        )
    ]


def trimmed_pieces(messages: list[Message]) -> Pieces:
    """Blanks are taken off; a system message is there whether the chat has one or not."""
    given = [] if messages[0]["role"] == "system" else [{"role": "template", "content": "Be kind."}]
    return [("<s>", "template")] + [
        piece
        for message in [*given, *messages]
        for piece in (
            (f"[{'system' if message['role'] == 'template' else message['role']}] ", "template"),
            (message["content"].strip(), message["role"]),
            ("\n", "template"),
        )
    ]


def merged_pieces(messages: list[Message]) -> Pieces:
    """The system's words go into the first message of the user."""
    system = [message for message in messages if message["role"] == "system"]
    pieces: Pieces = []
    for message in messages:
        if message["role"] == "user":
            pieces.append(("[INST] ", "template"))
            for one in system:
                pieces += [(one["content"], "system"), ("\n\n", "template")]
            system = []
            pieces += [(message["content"], "user"), (" [/INST]", "template")]
        elif message["role"] == "assistant":
            pieces += [(message["content"].rstrip(), "assistant"), ("</s>", "template")]
    return pieces


TEMPLATES = {
    "plain": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}",
        plain_pieces,
    ),
    "trimmed": (
        "{{ bos_token }}{% if messages[0].role != 'system' %}[system] Be kind.\n{% endif %}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}",
        trimmed_pieces,
    ),
    "merged": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content + '\n\n' %}{% elif m.role == 'user' %}[INST] {{ ns.system + m.content }} [/INST]"
        "{% set ns.system = '' %}{% else %}{{ m.content.rstrip() }}</s>{% endif %}{% endfor %}",
        merged_pieces,
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("roles"))))


WORDS = st.text(" \nab東é</>[]{}'\"", min_size=1, max_size=12).filter(str.strip)
TURNS = st.lists(WORDS, min_size=1, max_size=4)


def conversation(turns: list[str], system: str | None) -> list[Message]:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


@pytest.mark.parametrize("which", TEMPLATES)
@given(TURNS, st.none() | WORDS)
def test_every_character_is_of_its_message(made: Made, which: str, turns: list[str], system: str | None):
    template, pieces_of = TEMPLATES[which]
    messages = conversation(turns, system)
    pieces = pieces_of(messages)
    expected = [name for text, name in pieces for _ in text]
    text, spans = spans_of(Chat(tuple(messages), template=template), made.rendered, "d")
    assert text == "".join(text for text, _ in pieces)
    found = ["template"] * len(text)
    for start, end, name in spans:
        found[start:end] = [name] * (end - start)
    assert found == expected


@pytest.mark.parametrize("which", TEMPLATES)
def test_tokens_have_the_roles_of_their_bytes(made: Made, which: str):
    template, pieces_of = TEMPLATES[which]
    messages = conversation([" naïve 東京?\n", "on the mat 😀 ", "and?"], "  kind ")
    chat = Chat(tuple(messages), template=template)
    ids, sections = Encoder(made, chats=True, template=template, sections=True, by_characters=True).encoded(chat)
    assert sections is not None and ids.tolist() == made.chat(chat).tolist()
    expected = []
    for text, name in pieces_of(messages):
        expected += [name] * (1 if text == "<s>" else len(text.encode()))  # <s> is one token
    assert sections.names.array.tolist() == expected


THINKING = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set c = m.content %}{%- set r = '' %}"
    "{%- if '</think>' in c %}{%- set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set c = c.split('</think>')[-1].lstrip('\n') %}{%- endif %}<a>"
    "{%- if loop.last and r %}{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}"
    "{%- else %}{{ c }}{%- endif %}{%- if m.tool_calls %}{%- for t in m.tool_calls %}"
    "<call>{{ t.function | tojson }}</call>{%- endfor %}{%- endif %}</a>"
    "{%- elif m.role == 'tool' %}<t>{{ m.content }}</t>{%- else %}<u>{{ m.content }}</u>{%- endif %}{%- endfor %}"
)


def labelled(made: Made, messages: list[Message], template: str, **more: Any) -> Pieces:
    """The rendered chat as pieces, those of no message too."""
    text, spans = spans_of(Chat(tuple(messages), template=template, **more), made.rendered, "d")
    pieces, begin = [], 0
    for start, end, name in [*spans, (len(text), len(text), "")]:
        pieces += [(text[begin:start], "template"), (text[start:end], name)]
        begin = end
    return [piece for piece in pieces if piece[0]]


def test_thoughts_are_followed_and_those_left_out_are_not_missed(made: Made):
    thought = "<think>\nhm, 東\n</think>\n\nyes"
    messages = [
        {"role": "user", "content": "so?"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": thought},
    ]
    assert labelled(made, messages, THINKING) == [
        ("<u>", "template"),
        ("so?", "user"),
        ("</u><a>", "template"),
        ("yes", "assistant"),
        ("</a><u>", "template"),
        ("sure?", "user"),
        ("</u><a><think>\n", "template"),
        ("hm, 東", "assistant"),
        ("\n</think>\n\n", "assistant"),
        ("yes", "assistant"),
        ("</a>", "template"),
    ]


def test_calls_of_tools_are_the_assistants_and_their_answers_the_tools(made: Made):
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": '東 "mat"', "n": 3}}}
    messages = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "look", "content": "on the mat", "tool_call_id": "7"},
    ]
    found = labelled(made, messages, THINKING)
    assert [text for text, name in found if name == "assistant"] == ["look", '東 \\"mat\\"']
    assert [text for text, name in found if name == "tool"] == ["on the mat"]
    assert "".join(text for text, _ in found) == made.rendered(Chat(tuple(messages), template=THINKING))


def test_parts_of_a_content_are_its_roles(made: Made):
    each = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}|{% endfor %}"
    template = f"{{% for m in messages %}}<{each}>{{% endfor %}}"
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]
    found = labelled(made, [{"role": "user", "content": parts}], template)
    assert found == [("<", "template"), ("one", "user"), ("||", "template"), ("two", "user"), ("|>", "template")]


def test_a_message_that_is_open_stays_so(made: Made):
    template = TEMPLATES["plain"][0]
    messages = conversation(["so?", "It is "], None)
    found = labelled(made, messages, template, continue_final=True)
    assert found[-1][1] == "assistant" and found[-1][0].rstrip() == "It is"
    assert "".join(text for text, _ in found) == made.rendered(Chat(tuple(messages), None, template, None, True))


def test_what_a_dataset_adds_to_messages_does_not_matter(made: Made):
    messages = [{"role": "user", "content": "hi", "date": "today", "meta": {"from": ["here"]}, "name": "Ann"}]
    assert labelled(made, messages, TEMPLATES["plain"][0])[1] == ("hi", "user")


def test_spans_of_a_content_have_sections_of_their_own(made: Made):
    """As needles in a chat: the rest of the message is its role's."""
    for template in (TEMPLATES["plain"][0], TEMPLATES["trimmed"][0]):
        messages = [{"role": "user", "content": " hay needle hay "}, {"role": "assistant", "content": "found"}]
        found = labelled(made, messages, template, spans=(((5, 11, "needle"),), ()))
        named = [(text.strip(), name) for text, name in found if name != "template"]
        assert named == [("hay", "user"), ("needle", "needle"), ("hay", "user"), ("found", "assistant")]


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ messages[0].content[:3] }}", "the content of message 0 .'where is it\\?'. cannot be followed"),
        ("{{ messages[0].content | reverse }}", "cannot be followed"),
        ("{{ messages[0].content | length }}", "cannot be followed"),
        ("{% if messages[0].content.startswith('where') %}one{% else %}two{% endif %}", "cannot be followed"),
        ("{% for a in messages[0].content %}{{ a if a < 'z' else '' }}{% endfor %}", "cannot be followed"),
    ],
)
def test_what_cannot_be_followed_is_refused(made: Made, template: str, named: str):
    chat = Chat(({"role": "user", "content": "where is it?"},), template=template)
    with pytest.raises(
        DatasetError, match=f"^document 'd': what the chat template .*{named}.*chat.sections=false"
    ) as caught:
        spans_of(chat, made.rendered, "d")
    assert "\n" not in str(caught.value)


def test_a_text_that_the_template_changes_is_still_its_roles(made: Made):
    for way, changed in (("upper", "WHERE IS IT?"), ("replace('where', 'here')", "here is it?")):
        template = "<u>{{ messages[0].content | " + way + " }}</u>"
        found = labelled(made, [{"role": "user", "content": "where is it?"}], template)
        assert found == [("<u>", "template"), (changed, "user"), ("</u>", "template")]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "template", "content": "x"}, "has the role 'template'"),
        ({"role": "user", "content": "x\U000f0000"}, "private planes"),
        ({"role": "", "content": "x"}, "has nothing where the name of a section"),
    ],
)
def test_a_chat_that_could_be_taken_for_another_is_refused(made: Made, message: Message, named: str):
    with pytest.raises(DatasetError, match=f"document 'd'.*{named}"):
        spans_of(Chat((message,), template=TEMPLATES["plain"][0]), made.rendered, "d")


def test_only_a_tokenizer_that_says_its_offsets_has_roles(tmp_path: Path, made: Made):
    class Slow:
        beginning = None

        def template(self, wanted: Any) -> str:
            return "x"

        def chat(self, chat: Chat) -> np.ndarray:
            return by_letter(chat.messages[0]["content"])

        def __call__(self, text: str) -> np.ndarray:
            return by_letter(text)

    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "abc"}]}))
    keys = {"path": str(tmp_path), "messages_column": "messages"}
    with pytest.raises(CheckpointError, match=r"dataset\.chat\.sections=false"):
        Tokenizer(Slow(), None).documents(JsonLines(**keys))
    (document,) = Tokenizer(Slow(), None).documents(JsonLines(**keys, chat=ChatFormat(sections=False)))
    assert document.sections is None and document.n_tokens == 3


CHATS = [
    {
        "id": f"chat-{n}",
        "messages": conversation([f"where is {n}? 東 "] + ["on the mat, " * m for m in range(1, n + 1)], "be kind"),
    }
    for n in range(5)
]
CHAT = ("dataset.messages_column=messages", "batch.max_tokens=300")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("chats")
    save_tokenizer(place / "tokenizer", chat_template=TEMPLATES["trimmed"][0])
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return Runs(save_checkpoint(place / "model"), place / "texts.jsonl", place)


def test_runs_of_chats_hold(runs: Runs):
    named = (f"model.tokenizer={runs.place / 'tokenizer'}", *CHAT)
    whole = runs.start("whole", *named)
    manifest, problems = verify(whole)
    run = open_run(whole)
    assert problems == [] and isinstance(run, Run) and run.sections == ("assistant", "system", "template", "user")
    table = rows(whole)
    bare = runs.start("bare", *named, "dataset.chat.sections=false")
    assert rows(bare).equals(table.drop("section")) and verify(bare)[1] == []
    expected = {
        row["id"]: [
            name for text, name in trimmed_pieces(row["messages"]) for _ in ([0] if text == "<s>" else text.encode())
        ]
        for row in CHATS
    }
    joined = run.scan().join(run.examples().lazy().select("example_id", "source_id"), on="example_id").collect()
    for source, position, section in joined.select("source_id", "position", "section").iter_rows():
        assert expected[source][position] == section
    stopped = runs.start("stopped", *named, "batch.max_tokens=80", "output.checkpoint_every=1", stop_after=2)
    assert verify(stopped)[1] == [] and take_up(stopped)
    must_be_whole(stopped, runs.start("never", *named, "batch.max_tokens=80"))
    shards = [
        runs.start(f"shard-{n}", *named, "batch.max_tokens=80", "dataset.shard.count=2", f"dataset.shard.index={n}")
        for n in range(2)
    ]
    together = pl.concat(map(rows, shards)).sort(ORDER)
    assert together.drop("vector").equals(rows(stopped).drop("vector"))
    assert "roles" not in manifest.dataset and manifest.dataset["sections"] is True
