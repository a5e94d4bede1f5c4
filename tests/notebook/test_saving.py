"""What was captured in a notebook becomes a run that reads the same, and is verified."""

from __future__ import annotations

import copy
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sniffer.experiments.common.rows import chosen_layers
from sniffer.models import finder

import sniffer
from sniffer import open_run
from sniffer.config.trust import Trust
from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.runs.law import check_law
from sniffer.runs.reproduce import reproduce
from sniffer.runs.verify import verify
from sniffer.sampler import LogUniform, picker_of
from sniffer.storage.examples import read_examples
from sniffer.storage.layout import RunFolder
from tests.notebook.test_going_on import text_of
from tests.notebook.test_listener import IDS, LEFT, generate

finder.install()

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]
SAMPLER = LogUniform(base_rate=6.0, min_bucket_size=8)


def loaded(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").eval()


def test_a_saved_capture_is_a_run(checkpoint: Path, tmp_path: Path):
    model, kinds = loaded(checkpoint), ["q", "k", "v", "q_pre", "k_pre"]
    with sniffer.sniff(model, sampler=SAMPLER, kinds=kinds, example_ids=["one", "two"], seed=5) as captured:
        out = generate(model, attention_mask=LEFT)
    folder = captured.save(tmp_path / "run")
    manifest, problems = verify(folder)
    assert problems == [] and manifest.status == "complete" and manifest.rows_by_kind == captured.rows
    run = open_run(folder)
    assert isinstance(run, Run)
    ids = dict(run.examples().select("source_id", "example_id").iter_rows())
    assert run.tokens(ids["one"]).tolist() == out[0, :-1].tolist()
    assert run.tokens(ids["two"]).tolist() == out[1, 5:-1].tolist()
    for kind in kinds:
        for head in run.heads(1, kind):
            mine, theirs = (one.vectors(layer=1, head=head, kind=kind) for one in (captured, run))
            assert len(mine) and mine.rows.same(theirs.rows) and np.array_equal(mine.vectors, theirs.vectors)
            assert np.array_equal(mine.inclusion_probability, theirs.inclusion_probability)
    mine, theirs = (one.pairs(layer=0, q_head=3) for one in (captured, run))
    assert mine.rows.same(theirs.rows) and np.array_equal(mine.q, theirs.q) and np.array_equal(mine.k, theirs.k)
    assert np.array_equal(mine.inclusion_probability, theirs.inclusion_probability)
    columns = ["layer", "kind", "head", "bucket", "position", "token_id", "example_id", "vector"]
    told = pl.col("kind").cast(pl.String)
    tables = [one.scan().select(columns).with_columns(told).collect().sort(columns[:-1]) for one in (captured, run)]
    assert tables[0].schema == tables[1].schema and tables[0].equals(tables[1])
    with pytest.raises(RunError, match="was captured in a notebook and has no configuration to run"):
        reproduce(folder, tmp_path / "again", Trust())
    with pytest.raises(RunError, match="is there already"):
        captured.save(tmp_path / "run")


@torch.no_grad()
def test_what_is_no_run_is_not_saved(checkpoint: Path, tmp_path: Path):
    model = loaded(checkpoint)
    with sniffer.sniff(model, sampler="all") as captured:
        with pytest.raises(RunError, match="nothing was captured"):
            captured.save(tmp_path / "run")
        model(IDS, position_ids=torch.arange(3, 15)[None])
        with pytest.raises(RunError, match="document 0 begins at position 3, and what is before is not known"):
            captured.save(tmp_path / "run")
        captured.clear()
        cache = model(IDS[:1], use_cache=True).past_key_values
        captured.clear()
        model(IDS[:1, :2], past_key_values=copy.deepcopy(cache))
        model(IDS[:1, 2:4], past_key_values=cache)
        with pytest.raises(RunError, match="begins at position 12, and what is before is not known"):
            captured.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_branches_are_documents_from_where_they_part(checkpoint: Path, tmp_path: Path):
    """Beams and samples of a prompt: texts are whole, rows and moments those behind, as verify knows."""
    torch.manual_seed(0)
    model, several = loaded(checkpoint), {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}
    told = {"pad_token_id": 0, "eos_token_id": None, "attention_mask": LEFT}
    with sniffer.sniff(model, sampler=SAMPLER, moments="k", seed=2) as captured:
        generate(model, num_beams=3, attention_mask=LEFT)
        model.generate(IDS, **several, **told)
    assert len(captured.branches) > 4
    folder = captured.save(tmp_path / "run")
    assert verify(folder)[1] == []
    run = open_run(folder)
    assert isinstance(run, Run) and run.branches == len(captured.branches)
    first = dict(run.examples().select("example_id", "first_position").iter_rows())
    for number, start in first.items():
        branch = captured.branches.get(number)
        assert start == (0 if branch is None else branch.position)
        assert run.tokens(number).tolist() == text_of(captured, number)
        assert len(run.tokens(number)) - start == len(captured.tokens(number))
    for kind in ("q", "k"):
        mine, theirs = (one.vectors(layer=1, head=1, kind=kind) for one in (captured, run))
        assert len(mine) and mine.rows.same(theirs.rows) and np.array_equal(mine.vectors, theirs.vectors)
    mine, theirs = (one.moments(layer=1, head=1, kind="k") for one in (captured, run))
    assert mine.n == theirs.n == sum(len(captured.tokens(number)) for number in first)
    with pytest.raises(RunError, match="analyses take whole texts"):
        chosen_layers(run, None, "q")

    table = read_examples(folder / RunFolder.EXAMPLES)
    number = next(number for number, start in first.items() if start)
    table[number] = replace(table[number], first_position=0)
    problems = list(check_law(picker_of(SAMPLER, 2), table, 1, "k", run.vectors(layer=1, head=1, kind="k").rows))
    assert len(problems) == 1 and "positions that the law keeps are missing" in problems[0]


def test_the_example_of_the_docs_runs(capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(ROOT / "docs/examples/notebook_generation.py"))["main"]()
    told = capsys.readouterr().out
    assert told.count("Captured(2 documents; rows: 264 q, 132 k)") == 4
    apart = re.findall(r"14 positions, largest difference (\S+)", told)
    assert len(apart) == 4 and max(map(float, apart)) < 1e-5
