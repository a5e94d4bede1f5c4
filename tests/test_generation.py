"""Runs whose documents a model goes on with: what it writes, what is captured of it, and what a run may meet."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from sniffer.config.trust import Trust
from sniffer.engine import generating
from sniffer.errors import CaptureError, ConfigError, DatasetError, RunError, SnifferError, UnsupportedModelError
from sniffer.forward.attention.attending import AttentionPlan
from sniffer.forward.attention.prove import Way
from sniffer.forward.generation.attention import require_steps
from sniffer.forward.generation.request import CACHING, GenerateConfig
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.extend import extend
from sniffer.runs.publish import assemble
from sniffer.runs.reproduce import reproduce
from sniffer.runs.verify import verify
from sniffer.storage.examples import read_examples
from sniffer.storage.manifest import Manifest
from sniffer.types import Answer, AttentionLayout
from tests.helpers_runs import TEXTS, Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint, save_texts, save_tokenizer

GREEDY = ("generate=greedy", "generate.max_new_tokens=9")
LATER = (*GREEDY, "generate.live=false")
SAMPLE = ("generate=sample", "generate.max_new_tokens=9", "generate.seed=5")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("generation")
    return Runs(save_checkpoint(place / "model"), save_texts(place / "texts.jsonl", TEXTS), place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.start("whole", *GREEDY)


def examples(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Of each document the tokens that were written, and how they end."""
    table = pl.read_parquet(folder / "examples.parquet")
    return {name: (ids, end) for name, ids, end in table.select("source_id", "generated", "end").iter_rows()}


def by_transformers(checkpoint: Path, text: str, new: int) -> list[int]:
    """What the model writes by itself, one text alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint)(text).input_ids])
    out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def test_the_text_is_the_one_that_transformers_writes(runs: Runs, whole: Path):
    found = examples(whole)
    assert found.keys() == TEXTS.keys()
    for name, text in list(TEXTS.items())[:5]:
        assert found[name] == (by_transformers(runs.checkpoint, text, 9), "length")


@pytest.mark.parametrize("live", ["true", "false"])
def test_rows_are_those_of_the_whole_text(runs: Runs, tmp_path: Path, live: str):
    """As a run over these token ids has them, with the same positions: that run knows nothing of generation."""
    whole = runs.start(f"rows-{live}", *GREEDY, f"generate.live={live}")
    assert verify(whole)[1] == []
    run = open_run(whole)
    assert isinstance(run, Run)
    names = dict(run.examples().select("example_id", "source_id").iter_rows())
    data = [{"id": name, "ids": run.tokens(number).tolist()} for number, name in names.items()]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    told = ("dataset.text_column=text", "dataset.tokens_column=ids", f"dataset.path={tmp_path / 'ids.jsonl'}")
    plain, ours = rows(runs.start(f"plain-{live}", *told)), rows(whole)
    assert ours.drop("vector", "section").equals(plain.drop("vector"))
    for one, other in zip(ours["vector"], plain["vector"], strict=True):
        assert np.allclose(one, other, atol=1e-5)
    assert set(ours["section"]) == {"prompt", "generated"}
    lengths = dict(run.examples().select("example_id", "n_tokens").iter_rows())
    for row in ours.iter_rows(named=True):
        assert (row["section"] == "generated") == (row["position"] >= lengths[row["example_id"]] - 9)


def test_what_is_counted_and_recorded(whole: Path):
    manifest = Manifest.load(whole)
    n = len(TEXTS)
    assert manifest.counts["generated"] == 9 * n
    assert manifest.counts["tokens"] == sum(map(len, TEXTS.values())) + 9 * n
    assert manifest.generation is not None and manifest.generation["method"] == "greedy"
    assert manifest.generation["sections"] == ["generated"] and manifest.dataset["sections"] is True
    assert {"prefill", "decode"} <= manifest.timings.keys() and "forward" not in manifest.timings
    assert not manifest.differences and "differences" not in json.loads((whole / "manifest.json").read_text())
    assert manifest.config["generate"]["max_new_tokens"] == 9
    tokens = pl.read_parquet(whole / "tokens" / "*.parquet").sort("example_id")
    table = pl.read_parquet(whole / "examples.parquet").sort("example_id")
    for ids, written in zip(tokens["token_ids"], table["generated"], strict=True):
        assert ids.to_list()[-9:] == written.to_list()


def test_without_generation_nothing_is_new(runs: Runs):
    folder = runs.start("none", "generate=none")
    assert "generate" not in (folder / "config.yaml").read_text()
    values = json.loads((folder / "manifest.json").read_text())
    assert "generation" not in values and "generated" not in values["counts"]
    assert set(pl.read_parquet(folder / "examples.parquet").columns) == {
        "example_id",
        "source_id",
        "n_tokens",
        "truncated",
    }


def test_what_is_drawn_does_not_depend_on_the_batch(runs: Runs):
    together, alone = (runs.start(f"batch-{n}", *SAMPLE, f"batch.max_tokens={n}") for n in (900, 1))
    assert examples(together) == examples(alone)
    other = runs.start("batch-seed", *SAMPLE[:2], "generate.seed=6")
    assert all(ids != examples(together)[name][0] for name, (ids, _) in examples(other).items())


@pytest.mark.long
@pytest.mark.parametrize("how", [GREEDY, SAMPLE, LATER])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(runs: Runs, how: tuple[str, ...]):
    name = how[0].partition("=")[2] + how[-1].partition("=")[2]
    reference = runs.start(f"{name}-whole", *how)
    for every in ("", "output.checkpoint_every=1"):
        more = (every,) if every else ()
        folder = runs.start(f"{name}-stopped{len(more)}", *how, *more, stop_after=3)
        assert Manifest.load(folder).status == "interrupted"
        assert take_up(folder)
        must_be_whole(folder, reference)
        assert examples(folder) == examples(reference)


def test_parts_that_do_not_count_yet_are_captured_again(runs: Runs, whole: Path):
    """What would be written anew may differ by a rounding, and then rows of two texts would be one document's."""
    folder = runs.start("pending", *GREEDY, "output.memory_limit=1KB", stop_after=4)
    manifest = Manifest.load(folder)
    replace(manifest, pending=manifest.parts, parts=(), examples=None, tokens=(), status="running").save(folder)
    assert take_up(folder)
    must_be_whole(folder, whole)
    assert not Manifest.load(folder).pending


def test_what_is_on_disk_stands_where_it_would_be_written_otherwise(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    from sniffer.forward.generation import continuing

    folder = runs.start("other", *GREEDY, "output.checkpoint_every=1", "batch.max_tokens=2000", stop_after=1)
    before = examples(folder)
    assert 1 < len(before) < len(TEXTS)
    honest = continuing.next_tokens
    monkeypatch.setattr(continuing, "next_tokens", lambda *args: (honest(*args) + 1) % 200)
    assert take_up(folder)
    assert verify(folder)[1] == []
    after = examples(folder)
    assert after.items() >= before.items() and len(after) == len(TEXTS)


def test_a_run_is_reproduced(whole: Path, tmp_path: Path):
    assert reproduce(whole, tmp_path / "again", Trust()) == (
        True,
        [f"identical: {Manifest.load(whole).rows:,} rows, digest {Manifest.load(whole).digest}"],
    )


def test_verify_finds_other_tokens(runs: Runs):
    folder = runs.start("altered", *GREEDY)
    manifest = Manifest.load(folder)
    table = pq.read_table(folder / "tokens" / "part-00000.parquet")
    ids = table["token_ids"].to_pylist()
    ids[0][-1] = 3
    column = pa.array(ids, table.schema.field("token_ids").type)
    pq.write_table(table.set_column(1, table.schema.field(1), column), folder / "tokens" / "part-00000.parquet")
    content = (folder / "tokens" / "part-00000.parquet").read_bytes()
    record = replace(manifest.tokens[0], bytes=len(content), sha256=sha256(content).hexdigest())
    replace(manifest, tokens=(record,)).save(folder)
    assert any("does not end with the tokens that were generated" in line for line in verify(folder)[1])


def test_both_keeps_what_is_live_and_tells_how_far_it_is_from_the_whole(
    runs: Runs, whole: Path, capsys: pytest.CaptureFixture[str]
):
    both, later = runs.start("both", *GREEDY, "generate.live=both"), runs.start("later", *LATER)
    manifest = Manifest.load(both)
    assert manifest.digest == Manifest.load(whole).digest != Manifest.load(later).digest
    assert "largest difference, over length" in " ".join(capsys.readouterr().out.split())
    ours, theirs = rows(both), rows(later)
    for layer, kinds in manifest.differences.items():
        for kind, told in kinds.items():
            one, other = (
                np.stack(list(table.filter(layer=layer, kind=kind)["vector"].to_numpy())).astype(np.float64)
                for table in (ours, theirs)
            )
            # Batches of whole documents differ, and so may roundings.
            relative = (np.linalg.norm(one - other, axis=1) / np.linalg.norm(other, axis=1)).max()
            assert told["vectors"] == len(one) and 0 <= told["largest"] < 1e-4
            assert abs(told["relative"] - relative) < 2e-6
    assert set(manifest.differences) == {0, 1} and set(manifest.differences[0]) == {"q", "k"}
    assert verify(both)[1] == []


def test_statistics_of_attention_live_are_those_of_the_whole_text(runs: Runs):
    """With sections of keys; `both` tells differences of vectors alone."""
    more = (*GREEDY, "capture.attention=all", "capture.attention_sections=[prompt,generated]")
    live, later = (runs.start(f"attention-{how}", *more, f"generate.live={how}") for how in ("both", "false"))
    assert verify(live)[1] == [] and "attention" not in Manifest.load(live).differences[0]
    for layer in (0, 1):
        ours, theirs = (open_run(folder).attention(layer=layer, q_head=1) for folder in (live, later))
        assert len(ours) and ours.schema == theirs.schema and "section_mass" in ours.columns
        for name in ours.columns:
            one, other = (table[name].to_numpy() for table in (ours, theirs))
            if name == "section":
                assert (one == other).all()
            elif name not in ("top_position", "max_position"):  # which may tie
                assert np.allclose(one.astype(float), other.astype(float), atol=1e-4), name
        masses = ours["section_mass"].to_numpy()
        written = ours["section"].to_numpy() == "generated"
        assert np.allclose(masses.sum(1), 1, atol=1e-5) and (masses[~written, 1] == 0).all()
        assert (masses[written][1:, 1] > 0).any()


def test_what_cannot_be_told_while_a_model_writes_is_refused():
    layout = AttentionLayout(("section",), 1, 1, 1, sections=("answer", "user"))
    plan = AttentionPlan(layout, {0: Way(), 1: Way()}, np.zeros(1, np.int32))
    require_steps(plan, Answer("answer"))
    with pytest.raises(ConfigError, match=r"capture.attention_sections names \['answer'\]"):
        require_steps(plan, Answer("assistant", (90, 91)))
    with pytest.raises(UnsupportedModelError, match="of layer 1 is had from the softmax in its own code"):
        require_steps(replace(plan, ways={0: Way(), 1: Way(inline=True)}), Answer())


@pytest.mark.parametrize("live", ["true", "false"])
def test_sections_may_be_kept_whole(runs: Runs, live: str):
    folder = runs.start(f"kept-{live}", *GREEDY, "sampler.keep_sections=[generated]", f"generate.live={live}")
    assert verify(folder)[1] == []
    kept = rows(folder).filter(section="generated", layer=0, kind="q", head=0)
    assert kept.group_by("example_id").len()["len"].to_list() == [9] * len(TEXTS)
    with pytest.raises(ConfigError, match="names 'answer', a section of no document: there are 'generated', 'prompt'"):
        runs.start(f"unkept-{live}", *GREEDY, "sampler.keep_sections=[answer]")


def test_texts_end_by_eos_and_by_strings(runs: Runs, whole: Path):
    ids = examples(whole)["doc-3"][0]
    folder = runs.start("eos", *GREEDY, f"generate.eos={ids[4]}")
    first = ids.index(ids[4])
    assert examples(folder)["doc-3"] == (ids[: first + 1], "eos")
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(runs.checkpoint).decode(ids[2])
    if text.isprintable() and "�" not in text:
        folder = runs.start("stop", *GREEDY, f"generate.stop={json.dumps([text])}")
        assert examples(folder)["doc-3"] == (ids[: ids.index(ids[2]) + 1], "stop")


CHAT = (
    "{% for m in messages %}({{ m.role }}: {{ m.content }}){% endfor %}"
    "{% if add_generation_prompt %}(assistant: {% endif %}"
)


def chats(place: Path, *messages: dict[str, str]) -> tuple[str, ...]:
    save_tokenizer(place / "words", adds=False, chat_template=CHAT)
    (place / "chats.jsonl").write_text(json.dumps({"id": "c", "messages": messages}) + "\n")
    data = (f"dataset.path={place / 'chats.jsonl'}", "dataset.messages_column=messages")
    return (*GREEDY, *data, f"model.tokenizer={place / 'words'}")


USER, SAID = {"role": "user", "content": "how far?"}, {"role": "assistant", "content": "not"}


def test_a_chat_is_answered(runs: Runs, tmp_path: Path):
    folder = runs.start("chat", *chats(tmp_path, USER))
    (example,) = read_examples(folder / "examples.parquet").values()
    assert example.sections is not None
    assert example.sections.spans() == [
        (0, 7, "template"),
        (7, 15, "user"),
        (15, 16 + 12, "template"),
        (28, 37, "assistant"),
    ]
    assert verify(folder)[1] == []


def test_an_answer_that_was_begun_is_gone_on_with(runs: Runs, tmp_path: Path):
    folder = runs.start("begun", *chats(tmp_path, USER, SAID), "dataset.chat.continue_final=true")
    (example,) = read_examples(folder / "examples.parquet").values()
    assert example.sections is not None and example.sections.spans()[-1] == (28, 40, "assistant")
    plain = runs.start("no-sections", *chats(tmp_path, USER), "dataset.chat.sections=false")
    (example,) = read_examples(plain / "examples.parquet").values()
    assert example.sections is not None and example.sections.spans() == [(0, 28, "prompt"), (28, 37, "generated")]


@pytest.mark.parametrize(
    ("messages", "more", "said"),
    [
        ((USER, SAID), (), "'c' ends with an answer of the assistant"),
        ((USER,), ("dataset.chat.continue_final=true",), "its last message is of 'user'"),
        (
            (USER, USER, USER),
            ("dataset.max_tokens=20",),
            "has 60 tokens, more than the 20 that leave room for an answer",
        ),
    ],
)
def test_a_chat_without_a_question_is_refused(
    runs: Runs, tmp_path: Path, messages: tuple, more: tuple[str, ...], said: str
):
    with pytest.raises(DatasetError, match=said):
        runs.start(f"refused-{len(messages)}", *chats(tmp_path, *messages), *more)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("dataset.window=8",), "dataset.window makes documents that are no prompts"),
        (("dataset.pack_to=64",), "dataset.pack_to makes documents that are no prompts"),
        (("output.tokens=false",), "set output.tokens=true, or generate=none"),
        (("model.compile=true",), "generate is not possible with model.compile=true"),
        (("generate.max_new_tokens=4000",), "generate.max_new_tokens=4000 leaves no room for a prompt"),
        (
            ("generate.max_new_tokens=2000", "dataset.max_tokens=100"),
            "dataset.max_tokens=100 and generate.max_new_tokens=2000 are more than the model's 2048 positions",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_loads(
    runs: Runs, words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
):
    from sniffer.models.backbone import Checkpoint

    monkeypatch.setattr(Checkpoint, "load", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(SnifferError, match=re.escape(said)):
        runs.start(f"refused-{abs(hash(words))}", *GREEDY, *words)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cache": "own"}, "generate.cache=own is not one of dynamic, static, quantized, or null"),
        ({"cache": "quantized", "cache_backend": "own"}, "cache_backend=own is not one of quanto, hqq, fp8, or null"),
        ({"cache_backend": "fp8"}, "generate.cache_backend is for generate.cache=quantized"),
        ({"cache": "static", "cache_backend": "fp8"}, "generate.cache_backend is for generate.cache=quantized"),
        ({"prefill_chunk_size": 0}, "generate.prefill_chunk_size=0 must be 1 or more"),
    ],
)
def test_a_cache_that_there_is_none_of_is_refused(asked: dict, said: str):
    with pytest.raises(ConfigError, match=re.escape(said)):
        GenerateConfig(**asked)


def test_what_quantises_a_cache_is_named_where_it_is_missing(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generating, "installed", lambda name: False)
    with pytest.raises(ConfigError, match="^generate.cache=quantized with quanto needs optimum-quanto: pip install "):
        runs.start("missing", *GREEDY, "generate.cache=quantized")
    with pytest.raises(ConfigError, match="^generate.cache=quantized with hqq needs hqq: pip install "):
        generating.check_cache(GenerateConfig(cache="quantized", cache_backend="hqq").caching)
    generating.check_cache(GenerateConfig(cache="quantized", cache_backend="fp8").caching)


def test_a_cache_that_is_not_said_leaves_no_trace(whole: Path):
    """So that runs of early releases and of this one are reproduced, resumed and extended by each other."""
    saved = yaml.safe_load((whole / "config.yaml").read_text())["generate"]
    manifest = Manifest.load(whole)
    for keys in (saved, manifest.config["generate"], manifest.generation or {}):
        assert "method" in keys and not {*keys} & {*CACHING}


@pytest.mark.long
def test_with_a_static_cache_and_chunks_the_rows_are_the_same(runs: Runs, whole: Path):
    folder = runs.start("static", *GREEDY, "generate.cache=static", "generate.prefill_chunk_size=7")
    assert examples(folder) == examples(whole) and verify(folder)[1] == []
    manifest = Manifest.load(folder)
    assert manifest.generation is not None
    assert (manifest.generation["cache"], manifest.generation["prefill_chunk_size"]) == ("static", 7)
    ours, theirs = rows(folder), rows(whole)
    assert ours.drop("vector").equals(theirs.drop("vector"))
    assert np.allclose(np.stack(ours["vector"].to_list()), np.stack(theirs["vector"].to_list()), atol=1e-4, rtol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("cache", [("static", None), ("quantized", "fp8")])
def test_a_run_with_a_cache_goes_on_and_is_reproduced(runs: Runs, tmp_path: Path, cache: tuple[str, str | None]):
    backend = [f"generate.cache_backend={cache[1]}"] if cache[1] else []
    words = (*GREEDY, f"generate.cache={cache[0]}", *backend, "generate.prefill_chunk_size=5")
    reference = runs.start(f"{cache[0]}-whole", *words)
    folder = runs.start(f"{cache[0]}-stopped", *words, stop_after=3)
    assert take_up(folder)
    must_be_whole(folder, reference)
    assert examples(folder) == examples(reference)
    same, said = reproduce(reference, tmp_path / "again", Trust())
    assert same and said[0].startswith("identical")


def test_prompts_leave_room_for_what_is_written(runs: Runs, tmp_path: Path):
    texts = save_texts(tmp_path / "long.jsonl", {"long": "x" * 3000})
    folder = runs.start("room", *GREEDY, f"dataset.path={texts}")
    (example,) = read_examples(folder / "examples.parquet").values()
    assert (example.n_tokens, example.truncated) == (2048, True) and example.generated is not None
    assert len(example.generated) == 9


def test_a_prompt_that_would_turn_otherwise_later_is_refused(runs: Runs, tmp_path: Path):
    rope = "{rope_parameters: {rope_type: dynamic, factor: 2.0, rope_theta: 10000.0}, max_position_embeddings: 40}"
    texts = save_texts(tmp_path / "short.jsonl", {"short": "x" * 35})
    words = (f"model.config_overrides={rope}", f"dataset.path={texts}", "dataset.max_tokens=35")
    with pytest.raises(CaptureError, match="'short' has 35 tokens and may come to 44"):
        runs.start("dynamic", *GREEDY, *words)


def test_an_interruption_while_a_model_writes_keeps_what_was_whole(
    runs: Runs, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    from sniffer.forward.generation import continuing

    honest, calls = continuing.next_tokens, [0]

    def failing(*args):
        calls[0] += 1
        if calls[0] == 40:
            raise RuntimeError("enough")
        return honest(*args)

    monkeypatch.setattr(continuing, "next_tokens", failing)
    with pytest.raises(RuntimeError):
        runs.start("broken", *GREEDY)
    monkeypatch.setattr(continuing, "next_tokens", honest)
    folder = runs.place / "broken"
    assert 0 < len(examples(folder)) < len(TEXTS) and verify(folder)[1] == []
    assert take_up(folder)
    must_be_whole(folder, whole)


def test_where_padding_has_a_say_nothing_is_padded(runs: Runs, whole: Path, monkeypatch: pytest.MonkeyPatch):
    from sniffer.models import language_model

    honest, masks = language_model.LoadedLanguageModel.generate, []

    def noting(self, ids, mask, *args):
        masks.append(mask)
        return honest(self, ids, mask, *args)

    monkeypatch.setattr(language_model, "prove", lambda *_: False)
    monkeypatch.setattr(language_model.LoadedLanguageModel, "generate", noting)
    folder = runs.start("alone", *GREEDY)
    assert all(mask.all() for mask in masks) and len(masks) >= len({len(text) for text in TEXTS.values()})
    assert examples(folder) == examples(whole)


def test_an_extended_run_has_what_one_over_all_documents_has(runs: Runs, tmp_path: Path):
    path, first = tmp_path / "texts.jsonl", dict(list(TEXTS.items())[:6])
    data = (f"dataset.path={path}", *GREEDY)
    save_texts(path, first)
    folder = runs.start("extended", *data)
    assert extend(folder, Trust()) is None
    save_texts(path, TEXTS)
    assert extend(folder, Trust()) == len(TEXTS)
    must_be_whole(folder, runs.start("at-once", *data, "batch.breaks=[6]"))
    save_texts(path, {**TEXTS, "doc-0": "another text", "new": "one more"})
    with pytest.raises(SnifferError, match="'doc-0' is not what it was when it was captured"):
        extend(folder, Trust())


def test_a_run_is_published_with_its_texts_or_not_at_all(whole: Path, tmp_path: Path):
    with pytest.raises(RunError, match="publish it --with-tokens"):
        assemble(whole, tmp_path / "without", "me/run")
    assert not (tmp_path / "without").exists()
    assemble(whole, tmp_path / "with", "me/run", tokens=True)
    assert verify(tmp_path / "with")[1] == []
    assert examples(tmp_path / "with") == examples(whole)


def test_a_way_to_generate_has_to_be_chosen(runs: Runs):
    with pytest.raises(ConfigError, match="choose generate=greedy or generate=sample, or none"):
        runs.start("no-way", "+generate.max_new_tokens=3")
