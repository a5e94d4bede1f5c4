"""Leaving rows out changes none of those that are left: not their ids, nor their positions, in any format or shard."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniffer import open_run
from sniffer.dataset.choosing import sample
from sniffer.dataset.files import TextFiles
from sniffer.dataset.hub import Hub
from sniffer.dataset.packages import Pydoc
from sniffer.dataset.source import Shard
from sniffer.dataset.tables import Csv, Json, JsonLines, Parquet
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.errors import ConfigError, DatasetError
from sniffer.runs.verify import verify
from tests.dataset.test_batching import Texts, by_letter
from tests.dataset.test_dataset import listed
from tests.helpers_runs import Runs, must_be_whole, rows, take_up
from tests.tiny_run import save_checkpoint

ROWS = [{"id": f"doc-{n}", "n": n, "kind": "odd" if n % 2 else None, "text": "cat " * (n + 2)} for n in range(12)]


@pytest.fixture(params=[JsonLines, Json, Csv, Parquet, Hub])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rows over two files of a format."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, made = tmp_path / "data", request.param
    folder.mkdir()
    for number, part in enumerate((ROWS[:5], ROWS[5:])):
        if made is Parquet:
            pq.write_table(pa.Table.from_pylist(part), folder / f"{number}.parquet")
        elif made is Json:
            (folder / f"{number}.json").write_text(json.dumps(part))
        elif made is Csv:
            with (folder / f"{number}.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, part[0])
                writer.writeheader()
                writer.writerows(part)
        else:
            (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return lambda **keys: made(**{"name" if made is Hub else "path": str(folder)}, **keys)


WHERES = [
    ("n > 3", lambda row: row["n"] > 3),
    ("kind = 'odd' AND n BETWEEN 2 AND 8", lambda row: row["kind"] == "odd" and 2 <= row["n"] <= 8),
    ("kind IS NULL", lambda row: row["kind"] is None),
    ("kind = 'odd' OR n = 4", lambda row: row["kind"] == "odd" or row["n"] == 4),
    ("text LIKE 'cat cat cat cat cat%'", lambda row: row["n"] >= 3),
]


@pytest.mark.parametrize(("where", "holds"), WHERES)
@pytest.mark.parametrize("id_column", ["id", None])
def test_rows_that_fit_are_what_they_are_in_the_whole(table: Any, where: str, holds: Any, id_column: str | None):
    whole = list(table(id_column=id_column).texts())
    wanted = [row for row, values in zip(whole, ROWS, strict=True) if holds(values)]
    assert list(table(id_column=id_column, where=where).texts()) == wanted
    source = table(id_column=id_column, where=where, max_examples=3)
    assert list(source.texts()) == wanted[:3] and len(source) == 3
    shards = [table(id_column=id_column, where=where, shard=Shard(n, 2)) for n in range(2)]
    assert sorted(row for shard in shards for row in shard.texts()) == sorted(wanted)
    assert source.describe()["where"] == where


def test_a_sample_is_drawn_from_the_rows_that_fit_and_read_in_their_order(table: Any):
    fitting = list(table(where="n > 3").texts())
    few, more = (list(table(where="n > 3", shuffle_seed=7, max_examples=n).texts()) for n in (3, 5))
    assert len(few) == 3 and set(few) < set(more) < set(fitting)
    assert more == [row for row in fitting if row in more] != fitting[:5]
    shards = [table(where="n > 3", shuffle_seed=7, max_examples=5, shard=Shard(n, 3)) for n in range(3)]
    assert sorted(row for shard in shards for row in shard.texts()) == sorted(more)


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("n >", "is no SQL condition"),
        ("1 = 1", "names no column"),
        ("n + 1", "not true or false"),
        ("n LIKE 'x'", "does not fit the columns n"),
        ("size > 1", "no column 'size', only id, n, kind, text"),
    ],
)
def test_what_is_no_condition_is_one_line(table: Any, where: str, named: str):
    with pytest.raises((ConfigError, DatasetError), match=named) as caught:
        table(where=where).check()
    assert "\n" not in str(caught.value)


def test_a_condition_that_nothing_fits_is_refused(table: Any):
    with pytest.raises(DatasetError, match=r"has no row that fits dataset\.where"):
        table(where="n > 99").check()


def test_a_condition_sees_into_nested_columns(tmp_path: Path):
    rows = [{"doc": {"lang": lang}, "text": lang} for lang in ("en", "fr", "en")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row[0] for row in JsonLines(path=str(tmp_path), where="doc.lang = 'en'").texts()] == [0, 2]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(-5, 2**70), st.randoms())
def test_a_sample_nests_and_does_not_depend_on_the_order(n: int, count: int, seed: int, random: Any):
    known = [(row, row * 977) for row in range(n)]
    drawn = sample(known, count, seed)
    assert len(drawn) == min(n, count) and drawn <= sample(known, count + 1, seed)
    assert {dict(known)[row] for row in drawn} == {
        dict(enumerate(e for _, e in shuffled))[row]
        for shuffled in [random.sample(known, n)]
        for row in sample(list(enumerate(e for _, e in shuffled)), count, seed)
    }


def test_any_source_can_be_sampled(tmp_path: Path):
    for n in range(9):
        (tmp_path / f"{n}.txt").write_text(str(n))
    for source, whole in (
        (TextFiles(path=str(tmp_path), max_examples=4, shuffle_seed=1), TextFiles(path=str(tmp_path))),
        (Pydoc(max_examples=4, shuffle_seed=1), Pydoc()),
        (listed(9, max_examples=4, shuffle_seed=1), listed(9)),
    ):
        drawn = list(source.texts())
        assert len(drawn) == 4 and drawn == [row for row in whole.texts() if row in drawn]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"shuffle_seed": 1}, "max_examples"),
        ({"min_tokens": 0}, "min_tokens=0"),
        ({"min_tokens": 9, "max_tokens": 8}, "more than the 8"),
        ({"min_tokens": 9, "window": 8}, "more than the 8"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict[str, int], named: str):
    with pytest.raises(ConfigError, match=named):
        Pydoc(**keys)


def test_short_documents_are_left_out_and_counted():
    dataset: Any = Texts("abcd", "", "ab", "abcdefg")
    dataset.min_tokens, dataset.window = 3, None
    tokenizer = Tokenizer(by_letter, None)
    assert [d.source_id for d in tokenizer.documents(dataset)] == ["row-0", "row-3"]
    assert tokenizer.counts.left_out() == {"skipped_empty": 1, "skipped_short": 1}
    dataset.window = 4
    assert [d.source_id for d in Tokenizer(by_letter, None).documents(dataset)] == ["row-0", "row-3", "row-3@4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("choosing")
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Runs(save_checkpoint(place / "checkpoint"), place / "texts.jsonl", place)


CHOSEN = ("dataset.where='n > 1'", "dataset.shuffle_seed=3", "dataset.max_examples=7", "dataset.min_tokens=21")


def test_documents_that_are_left_draw_what_they_draw_in_the_whole(runs: Runs, capsys: Any):
    whole, chosen = runs.start("all", "batch.max_tokens=1"), runs.start("chosen", *CHOSEN, "batch.max_tokens=1")
    manifest, problems = verify(chosen)
    assert problems == [] and manifest.counts["examples"] + manifest.counts["skipped_short"] == 7
    assert (
        manifest.counts["skipped_short"] > 0
        and f"and {manifest.counts['skipped_short']} short" in capsys.readouterr().out
    )
    examples = open_run(chosen).examples()
    assert rows(whole).join(examples, on="example_id", how="semi").equals(rows(chosen))


def test_a_stopped_run_is_completed_exactly(runs: Runs):
    given = (*CHOSEN, "batch.max_tokens=1", "output.checkpoint_every=1")
    folder = runs.start("stopped", *given, stop_after=2)
    assert take_up(folder)
    must_be_whole(folder, runs.start("never-stopped", *given))


def test_a_run_of_nothing_says_why(runs: Runs):
    with pytest.raises(DatasetError, match=r"12 documents shorter than dataset\.min_tokens"):
        runs.start("nothing", "dataset.min_tokens=2000")
