"""Token ids and chats: as they are, as the template has them, and the same rows as the same tokens by any other way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sniffer.models.tokenizer import Tokenizer as Made
from transformers import AutoTokenizer

from sniffer.dataset.content import ChatFormat
from sniffer.dataset.encoding import Encoder
from sniffer.dataset.hub import Hub
from sniffer.dataset.tables import Csv, Json, JsonLines, Parquet
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import CheckpointError, ConfigError, DatasetError
from sniffer.runs.verify import verify
from sniffer.types import Chat
from tests.dataset.test_batching import by_letter
from tests.helpers_runs import Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint, save_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking %}think {% endif %}"
    "{% for message in messages %}{% if message.role not in ['user', 'assistant', 'tool'] %}"
    "{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}.{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "where is the cat?"}, {"role": "assistant", "content": "on the mat " * 9}],
    [{"role": "user", "content": "naïve 東京 " * 5}],
    [{"role": "user", "content": "and the dog?"}, {"role": "assistant", "content": "over the hill"}],
]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "looks"}}]
ROWS = [{"id": f"chat-{n}", "messages": chat, "tools": TOOLS if n == 0 else []} for n, chat in enumerate(CHATS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("content")
    save_tokenizer(place / "chats", chat_template=TEMPLATE)
    save_tokenizer(place / "plain")
    return place


@pytest.fixture(scope="module")
def honest(place: Path) -> Any:
    """The tokenizer of transformers itself."""
    return AutoTokenizer.from_pretrained(place / "chats")


def write(folder: Path, rows: list[dict[str, Any]], made: Any) -> Any:
    """Rows as a dataset of a class, its keys yet to be given."""
    if made is Parquet:
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    elif made is Json:
        (folder / "a.json").write_text(json.dumps(rows))
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = "name" if made is Hub else "path"
    return lambda **keys: made(**{where: str(folder)}, id_column="id", **keys)


@pytest.fixture(params=[JsonLines, Json, Parquet, Hub])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    return lambda rows: write(tmp_path / "data", rows, request.param)


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"thinking": True}, {"enable_thinking": True}),
    ({"continue_final": True}, {"continue_final_message": True}),
    ({"template": "{{ messages[0].content }}"}, {"chat_template": "{{ messages[0].content }}"}),
]


@pytest.mark.parametrize(("keys", "asked"), OPTIONS)
def test_a_chat_has_the_ids_of_its_template(table: Any, honest: Any, keys: dict[str, Any], asked: dict[str, Any]):
    source = table(ROWS)(messages_column="messages", chat=ChatFormat(**keys))
    source.check()
    found = {d.source_id: d.token_ids.tolist() for d in Tokenizer(Made(honest), None).documents(source)}
    for row in ROWS:
        assert found[row["id"]] == honest.apply_chat_template(row["messages"], **asked)["input_ids"]
        assert found[row["id"]].count(0) == (0 if "template" in keys else 1)  # one beginning, where it writes one


def test_tools_reach_the_template(tmp_path: Path, honest: Any):
    source = write(tmp_path, ROWS, JsonLines)(messages_column="messages", chat=ChatFormat(tools_column="tools"))
    first, second, _ = Tokenizer(Made(honest), None).documents(source)
    assert first.token_ids.tolist() == honest.apply_chat_template(CHATS[0], tools=TOOLS)["input_ids"]
    assert second.token_ids.tolist() == honest.apply_chat_template(CHATS[1])["input_ids"]


def test_a_template_may_be_a_file(tmp_path: Path, place: Path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    keys = {"messages_column": "messages", "chat": ChatFormat(template=str(tmp_path / "mine.jinja"))}
    plain = Made(AutoTokenizer.from_pretrained(place / "plain"))
    source = write(tmp_path, ROWS, JsonLines)(**keys)
    documents = list(Tokenizer(plain, None).documents(source))
    assert documents[1].token_ids.tolist() == plain.without_special(CHATS[1][0]["content"]).tolist()
    (tmp_path / "mine.jinja").unlink()
    with pytest.raises(DatasetError, match=r"template=.*mine\.jinja cannot be read: No such file"):
        Tokenizer(plain, None).documents(source)


def test_what_cannot_be_rendered_is_one_line(tmp_path: Path, place: Path, honest: Any):
    source = write(tmp_path, ROWS, JsonLines)(messages_column="messages")
    with pytest.raises(CheckpointError, match=r"no such chat template: .*dataset\.chat\.template"):
        Tokenizer(Made(AutoTokenizer.from_pretrained(place / "plain")), None).documents(source)
    with pytest.raises(CheckpointError, match="plain function"):
        Tokenizer(by_letter, None).documents(source)
    odd = {"id": "odd", "messages": [{"role": "system", "content": "x"}]}
    source = write(tmp_path, [*ROWS, odd], JsonLines)(messages_column="messages")
    source.check()
    with pytest.raises(DatasetError, match="'odd': the chat template refuses it: roles are user and assistant; "):
        list(Tokenizer(Made(honest), None).documents(source))


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (None, "no messages"),
        ([], "no messages"),
        ("hello", "a str where they should be"),
        ([{"role": "user"}], "message 0 has role: wanted role and content"),
        ([CHATS[0][0], {"from": "gpt", "value": "x"}], "message 1 has from, value"),
        (["hello"], "message 0 is 'hello'"),
        ([{}], "message 0 is empty"),
    ],
)
def test_a_row_without_messages_is_named_before_any_model_loads(tmp_path: Path, messages: Any, named: str):
    source = write(tmp_path, [ROWS[0], {"id": "b", "messages": messages}], JsonLines)(messages_column="messages")
    with pytest.raises(DatasetError, match=f"row 1 of .* {named}"):
        source.check()


IDS = [{"id": f"doc-{n}", "ids": list(range(1, 40 + 17 * n))} for n in range(4)]


def test_token_ids_come_as_they_are(table: Any):
    source = table(IDS)(tokens_column="ids")
    source.check()
    found = list(Tokenizer(by_letter, 60).documents(source))
    assert [d.token_ids.tolist() for d in found] == [row["ids"][:60] for row in IDS]
    assert all(d.token_ids.dtype == np.int32 for d in found)


@pytest.mark.parametrize("ids", [None, "1 2", [1, -1], [1, 2**31], [1.5], [True], [1, None], ["1"], {"a": 1}, [[1]]])
def test_a_row_without_token_ids_is_named_before_any_model_loads(tmp_path: Path, ids: Any):
    source = write(tmp_path, [IDS[0], {"id": "b", "ids": ids}], JsonLines)(tokens_column="ids")
    with pytest.raises(DatasetError, match=r"row 1 of .* token ids"):
        source.check()


def test_a_column_of_another_type_is_refused_before_reading(tmp_path: Path):
    rows = [{"id": "a", "text": "x", "ids": [1], "messages": [{"role": "user", "content": "x"}]}]
    for made in (Parquet, Hub):
        source = write(tmp_path, rows, made)
        for keys in ({"tokens_column": "text"}, {"tokens_column": "messages"}, {"messages_column": "ids"}):
            with pytest.raises(DatasetError, match=r"is of type .*, not lists of (ids|messages): set dataset\."):
                source(**keys).check()
    (tmp_path / "a.csv").write_text("id,ids\na,1 2\n")
    with pytest.raises(DatasetError, match="row 0 of .* has a str where its token ids should be"):
        Csv(path=str(tmp_path), tokens_column="ids").check()


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"tokens_column": "a", "messages_column": "b"}, "both set"),
        ({"tokens_column": "a", "special_tokens": "add"}, "special_tokens=add is for texts"),
        ({"messages_column": "a", "special_tokens": "none"}, "special_tokens=none is for texts"),
        ({"chat": ChatFormat(thinking=True)}, "dataset.messages_column"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        JsonLines(path="x", **keys)


@pytest.fixture(scope="module")
def runs(place: Path, honest: Any) -> Runs:
    """The same tokens as chats, as ids, and as the text that a template makes."""
    made = []
    for row in ROWS:
        text = honest.apply_chat_template(row["messages"], tokenize=False)
        made.append({**row, "text": text, "ids": honest.apply_chat_template(row["messages"])["input_ids"]})
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return Runs(save_checkpoint(place / "model"), place / "texts.jsonl", place)


CHAT = ("dataset.messages_column=messages", "dataset.chat.sections=false")


def test_the_same_tokens_give_the_same_rows_however_they_came(runs: Runs):
    """As a chat, as ids, as the text of the chat, whose beginning gets no second one, and in one wide window."""
    named = f"model.tokenizer={runs.place / 'chats'}"
    whole = runs.start("by-chat", named, *CHAT)
    manifest, problems = verify(whole)
    assert problems == [] and len(manifest.model["tokenizer"]["chat_template"]) == 64
    by_text = runs.start("text", named)
    assert verify(by_text)[0].counts["begun"] == 3
    for other in (
        by_text,
        runs.start("ids", "dataset.tokens_column=ids"),
        runs.start("windows", named, *CHAT, "dataset.window=2000"),
    ):
        assert rows(other).equals(rows(whole))
        assert verify(other)[0].digest == manifest.digest


@pytest.mark.long
@pytest.mark.parametrize("how", ["chats", "ids"])
def test_a_stopped_run_is_completed_exactly(runs: Runs, how: str):
    given = (f"model.tokenizer={runs.place / 'chats'}", *CHAT) if how == "chats" else ("dataset.tokens_column=ids",)
    given = (*given, "batch.max_tokens=60", "output.checkpoint_every=1", "dataset.window=50", "dataset.stride=25")
    folder = runs.start(f"stopped-{how}", *given, stop_after=2)
    assert verify(folder)[1] == []
    assert take_up(folder)
    must_be_whole(folder, runs.start(f"never-stopped-{how}", *given))


def test_token_ids_need_no_tokenizer_and_are_checked_before_the_weights_are_read(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for file in runs.checkpoint.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    bare = Runs(tmp_path, runs.texts, tmp_path)
    assert rows(bare.start("bare", "dataset.tokens_column=ids")).equals(
        rows(runs.start("with", "dataset.tokens_column=ids"))
    )
    from sniffer.models.backbone import Checkpoint

    monkeypatch.setattr(Checkpoint, "load", lambda self: pytest.fail("the weights were read"))
    (tmp_path / "far.jsonl").write_text(json.dumps({"id": "far", "ids": [5, 300, 6]}))
    with pytest.raises(CheckpointError, match="document 'far' has token 300 at position 1, .* 257 rows"):
        Runs(tmp_path, tmp_path / "far.jsonl", tmp_path).start("far", "dataset.tokens_column=ids")


def test_a_chat_is_plain_data():
    """It travels to the thread that tokenises, and into messages."""
    chat = Chat(({"role": "user", "content": "hi"},))
    assert chat == Chat(({"role": "user", "content": "hi"},)) and chat.tools is None
    assert Encoder(by_letter).ids("ab").tolist() == [97, 98]
