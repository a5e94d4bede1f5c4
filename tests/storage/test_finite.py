"""NaN and infinity are kept to the bit, counted where they are written, and told of."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sniffer import capture
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs import __main__ as command
from sniffer.runs.reproduce import compare
from sniffer.runs.verify import verify
from sniffer.storage.finite import NotFinite, count_not_finite
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.writer import write_part
from sniffer.terminal.summary import not_finite_line
from tests.engine.test_crew import OneEngine, well
from tests.helpers_runs import Runs, must_be_whole, take_up
from tests.helpers_storage import make_columns, make_footer, make_run, take
from tests.tiny_run import save_checkpoint, save_texts

TEXTS = {f"doc-{n}": f"the cat number {n} sat on the {'Zoo' if n == 3 else 'mat'}. " * (1 + n % 3) for n in range(6)}
"""The token Z is in one of them."""

EVERYTHING = ("sampler.base_rate=500", "capture.kinds=[q,k,q_pre]")

FLOATS = st.sampled_from([0.0, -1.5, math.nan, -math.nan, math.inf, -math.inf, 3e38])


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6), elements=FLOATS))
def test_each_row_counts_once_for_nan_and_once_for_infinity(vectors: np.ndarray):
    rows = vectors.tolist()
    expected = NotFinite(sum(any(map(math.isnan, row)) for row in rows), sum(any(map(math.isinf, row)) for row in rows))
    assert count_not_finite(vectors) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_count_what_is_in_them_and_add_up(tmp_path: Path, dtype: torch.dtype):
    columns = make_columns(rows=300, heads=(1, 4), dim=6, dtype=dtype)
    vectors = torch.cat(columns.vectors).float().view(-1, 6).numpy()
    whole = write_part(tmp_path, RunFolder.part(3, "q", 0, 4), columns, make_footer(dim=6))
    assert whole.not_finite == count_not_finite(vectors) and whole.rows_with_nan and whole.rows_with_infinity
    parts = [
        write_part(tmp_path, RunFolder.part(3, "q", number, 4), take(columns, rows), make_footer(dim=6))
        for number, rows in enumerate(np.array_split(np.arange(300), 3))
    ]
    assert sum((part.not_finite for part in parts), NotFinite()) == whole.not_finite


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A model that makes NaN of one token, and infinity in one head of the last layer."""
    from safetensors.torch import load_file, save_file

    place = tmp_path_factory.mktemp("not finite")
    weights = save_checkpoint(place / "checkpoint") / "model.safetensors"
    token = json.loads((place / "checkpoint" / "tokenizer.json").read_text())["model"]["vocab"]["Z"]
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][token] = torch.nan
    tensors["model.layers.1.self_attn.q_proj.weight"][:2] = 3e38
    save_file(tensors, weights, metadata={"format": "pt"})
    return Runs(place / "checkpoint", save_texts(place / "texts.jsonl", TEXTS), place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.start("whole", *EVERYTHING)


def test_the_manifest_counts_by_layer_and_kind(whole: Path):
    """The witness reads the rows back, and counts with polars."""
    manifest, problems = verify(whole)
    found = open_run(whole)
    assert isinstance(found, Run) and not problems
    is_nan, is_infinite = pl.element().is_nan().any(), pl.element().is_infinite().any()
    rows = found.scan().with_columns(pl.col("vector").arr.to_list()).group_by("layer", "kind")
    counted = rows.agg(
        nan=pl.col("vector").list.eval(is_nan).list.first().sum(),
        infinity=pl.col("vector").list.eval(is_infinite).list.first().sum(),
    ).collect()
    expected = {(row["layer"], row["kind"]): NotFinite(row["nan"], row["infinity"]) for row in counted.to_dicts()}
    assert {(layer, kind): n for layer, kinds in manifest.not_finite.items() for kind, n in kinds.items()} == {
        pair: count for pair, count in expected.items() if count
    }
    assert manifest.not_finite[1]["q_pre"].infinity > manifest.not_finite[0]["q"].nan > 0
    written = json.loads((whole / "manifest.json").read_text())["rows"]["not_finite"]
    assert written["0"]["k"] == {"nan": manifest.not_finite[0]["k"].nan, "infinity": 0}


@pytest.mark.long
@pytest.mark.parametrize("output", ["output.checkpoint_every=2", "output.memory_limit=20kB"])
def test_counts_do_not_depend_on_parts_nor_on_who_writes_them(
    runs: Runs, whole: Path, tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
):
    mine = Runs(runs.checkpoint, runs.texts, tmp_path)
    wanted = Manifest.load(whole).not_finite
    folder = mine.start("stopped", *EVERYTHING, output, stop_after=2)
    assert take_up(folder)
    must_be_whole(folder, whole)
    assert Manifest.load(folder).not_finite == wanted
    monkeypatch.setattr(capture, "engine_for", lambda *_: OneEngine(well, size=2))
    folder = mine.start("crew", *EVERYTHING, output)
    must_be_whole(folder, whole)
    assert Manifest.load(folder).not_finite == wanted


def test_the_summary_warns_and_the_log_does_so_at_once(runs: Runs, capsys: pytest.CaptureFixture, caplog):
    folder = runs.start("told", *EVERYTHING)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: of ")]
    assert " with NaN, " in line and "layer 0 k (" in line and "; layer 1 k (" in line and "q_pre (" in line
    [early] = [record.getMessage() for record in caplog.records if "kept as they are" in record.getMessage()]
    assert early.startswith("layer ") and "vectors" in early
    assert command.main(["inspect", str(folder)]) == 0
    assert line.removeprefix("warning: ")[:40] in capsys.readouterr().out


def test_nothing_is_told_where_all_is_finite(tmp_path: Path, checkpoint: Path, texts: Path, capsys, caplog):
    folder = Runs(checkpoint, texts, tmp_path).start("finite")
    assert "warning" not in capsys.readouterr().out and not [r for r in caplog.records if "NaN" in r.getMessage()]
    manifest = Manifest.load(folder)
    assert (manifest.not_finite, manifest.counts_not_finite, not_finite_line(manifest)) == ({}, True, "none")


def test_of_parts_of_early_releases_it_is_not_known(tmp_path: Path):
    folder = make_run(tmp_path / "run", parts=2).folder
    manifest = Manifest.load(folder)
    assert manifest.not_finite
    text = json.loads((folder / "manifest.json").read_text())
    for part in text["parts"]:
        del part["rows_with_nan"], part["rows_with_infinity"]
    del text["checksum"], text["rows"]["not_finite"]
    (folder / "manifest.json").write_text(json.dumps(text))
    old = Manifest.load(folder)
    assert (old.not_finite, old.counts_not_finite, old.digest) == ({}, False, manifest.digest)
    assert not_finite_line(old).startswith("unknown") and old.as_json()["rows"]["not_finite"] is None
    old.save(folder)
    assert not [problem for problem in verify(folder)[1] if "part-" in problem]  # nobody has counted, so nobody wrong


@pytest.mark.parametrize("name", ["rows_with_nan", "rows_with_infinity"])
def test_a_count_that_is_not_that_of_the_rows_is_found(tmp_path: Path, name: str):
    folder = make_run(tmp_path / "run").folder
    manifest = Manifest.load(folder)
    before = verify(folder)[1]
    first, *others = manifest.parts
    wrong = replace(first, **{name: getattr(first, name) + 1})
    replace(manifest, parts=(wrong, *others)).save(folder)
    [problem] = set(verify(folder)[1]) - set(before)
    assert first.path in problem and "not finite" in problem


def test_two_runs_with_the_same_nan_are_not_apart(whole: Path):
    run = open_run(whole)
    assert isinstance(run, Run)
    same = compare(run, run)
    assert (same.differing, same.largest, same.relative) == (0, 0.0, 0.0) and same.rows == run.manifest.rows


def test_nan_in_one_run_and_a_number_in_the_other_is_a_difference_without_bound(tmp_path: Path):
    runs = [make_run(tmp_path / name) for name in ("one", "other")]
    assert compare(*(Run(run.folder, Manifest.load(run.folder)) for run in runs)).largest == 0.0
    manifest = Manifest.load(runs[1].folder)
    part, columns = manifest.parts[0], runs[1].captured[manifest.parts[0].layer, manifest.parts[0].kind]
    columns.vectors[0][columns.vectors[0].isnan()] = 1.0
    write_part(runs[1].folder, part.path, columns, make_footer(part.layer, part.kind, columns.dim))
    apart = compare(*(Run(run.folder, Manifest.load(run.folder)) for run in runs))
    assert apart.differing and apart.largest == math.inf
