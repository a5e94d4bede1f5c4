"""Verbs on a run whose documents have sections."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from sniffer.config.trust import Trust
from sniffer.reader import open_run
from sniffer.runs import __main__ as command
from sniffer.runs.export import export
from sniffer.runs.publish import assemble
from sniffer.runs.reproduce import reproduce
from sniffer.runs.verify import verify
from sniffer.storage.manifest import Manifest
from tests.helpers_runs import Runs, rows
from tests.tiny_run import save_checkpoint

QA = [{"id": f"doc-{n}", "question": f"where is number {n}?", "answer": "on the mat, " * n} for n in range(1, 6)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("verbs")
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QA))
    return Runs(save_checkpoint(place / "model"), place / "texts.jsonl", place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.start("whole", "dataset.text_column=[question,answer]", "sampler.base_rate=60")


def lines(text: str) -> dict[str, list[str]]:
    """The rows of the table of sections, by their first cell."""
    after = text.split("vectors by section")[1].splitlines()
    cells = [line.replace(",", "").split() for line in after if line.strip() and "─" not in line]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("where", ["summary", "inspect"])
def test_tokens_and_rows_are_counted_by_section(
    runs: Runs, whole: Path, where: str, capsys: pytest.CaptureFixture[str]
):
    if where == "summary":
        runs.start("again", "dataset.text_column=[question,answer]", "sampler.base_rate=60")
    else:
        assert command.main(["inspect", str(whole)]) == 0
    told, table = lines(capsys.readouterr().out), rows(whole)
    assert told["section"] == ["tokens", "q", "k"]
    tokens = {name: sum(len(row[name]) for row in QA) for name in ("question", "answer")} | {"(none)": 2 * len(QA)}
    for name, count in tokens.items():
        mine = table.filter(section="" if name == "(none)" else name)
        assert told[name] == [str(count), *(str(len(mine.filter(kind=kind))) for kind in ("q", "k"))]


def test_a_run_of_sections_is_reproduced(whole: Path, tmp_path: Path):
    identical, told = reproduce(whole, tmp_path / "again", Trust())
    assert identical and "identical" in told[0] and verify(tmp_path / "again")[1] == []


def test_rows_of_another_section_are_counted(runs: Runs, tmp_path: Path):
    """A label has changed by the time that the run is reproduced: its rows, and no vector, are others."""
    texts = [{"id": f"doc-{n}", "text": "where is it? on the mat, " * n} for n in range(1, 4)]

    def save(*labels: str) -> None:
        ends = [[{"start": 0, "end": 12, "label": label}] for label in labels]
        lines = (json.dumps({**text, "spans": spans}) for text, spans in zip(texts, ends, strict=True))
        (tmp_path / "texts.jsonl").write_text("".join(f"{line}\n" for line in lines))

    save("question", "question", "question")
    mine = Runs(runs.checkpoint, tmp_path / "texts.jsonl", tmp_path)
    folder = mine.start("run", "dataset.spans_column=spans", "sampler.base_rate=60")
    save("question", "asked", "question")
    identical, told = reproduce(folder, tmp_path / "again", Trust())
    ids = dict(open_run(folder).examples().select("source_id", "example_id").iter_rows())
    n = len(rows(folder).filter(example_id=ids["doc-2"], section="question"))
    assert not identical and n > 0 and told[0].startswith("not identical: 0 of ")
    assert told[1] == f"{n:,} rows that both have are of another section in each"


def test_other_layouts_have_the_section(whole: Path, tmp_path: Path):
    export(whole, tmp_path / "heads")
    for kind, head in (("q", 2), ("k", 1)):
        found = pl.read_parquet(tmp_path / "heads" / f"l01h{head:02d}{kind}" / "data.parquet")
        mine = rows(whole).filter(layer=1, kind=kind, head=head)
        on = ["example_id", "position"]
        assert found.sort(on).select(*on, "section").equals(mine.sort(on).select(*on, "section"))


def test_what_is_published_says_so(whole: Path, tmp_path: Path):
    assemble(whole, tmp_path / "published", "someone/run")
    assert "example_id, section, vector" in (tmp_path / "published" / "README.md").read_text()
    assert Manifest.load(tmp_path / "published").rows_by_section == Manifest.load(whole).rows_by_section
