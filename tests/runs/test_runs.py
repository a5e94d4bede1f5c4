"""Verbs on runs: what is wrong is found by name, a run reproduces itself, and other layouts hold the same rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from sniffer.models import finder
from sniffer.models.backbone import Checkpoint

from sniffer.config import trust as saved
from sniffer.config.trust import Trust
from sniffer.engine import worker
from sniffer.errors import RunError
from sniffer.forward.columns import Columns
from sniffer.process.threads import same_threads
from sniffer.reader.folders import state
from sniffer.reader.job_folders import run_folders
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs import __main__ as command
from sniffer.runs.code import code_of
from sniffer.runs.export import export
from sniffer.runs.listing import age
from sniffer.runs.reproduce import compare, reproduce
from sniffer.runs.resume import resume
from sniffer.runs.verify import missing_shards, verify, verify_all
from sniffer.storage.durable import HashedFile
from sniffer.storage.lock import hold
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import Footer, row_schema
from sniffer.storage.writer import parquet_options, write_part
from sniffer.types import Column, Rows
from tests.helpers_runs import TEXTS, Runs, rows, stopping_after
from tests.helpers_storage import make_run
from tests.tiny_copies import LLAMA, imported, llama_source, write_copy
from tests.tiny_run import save_checkpoint, save_texts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("runs")
    return Runs(save_checkpoint(place / "checkpoint"), save_texts(place / "texts.jsonl", TEXTS), place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.start("whole", "output.checkpoint_every=5")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def problems(folder: Path) -> list[str]:
    return verify(folder)[1]


def rewrite(folder: Path, change) -> None:
    """Puts a changed part in the place of the second one, and has the manifest agree with the file."""
    manifest = Manifest.load(folder)
    old = manifest.parts[1]
    file = pq.ParquetFile(folder / old.path)
    footer = Footer.decode(file.schema_arrow.metadata)
    table = file.read()
    first = table.filter(np.equal(table["head"].to_numpy(), table["head"][0].as_py()))
    heads, dim = manifest.selection[old.layer][old.kind], footer.dim
    floats = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(heads), len(first), dim)
    import torch

    columns = Columns(
        heads,
        [torch.from_numpy(np.ascontiguousarray(floats.transpose(1, 0, 2)).reshape(len(first), -1))],
        Rows(*(first[name].to_numpy() for name in ("bucket", "position", "token_id", "example_id"))),
        dim=dim,
    )
    changed, footer = change(columns, footer)
    part = replace(write_part(folder, old.path, changed, footer), commit=old.commit)
    replace(manifest, parts=tuple(part if p.path == old.path else p for p in manifest.parts)).save(folder)


def without_row(columns: Columns, row: int) -> Columns:
    keep = np.arange(len(columns)) != row
    import torch

    return Columns(
        columns.heads,
        [columns.vectors[0][torch.from_numpy(keep)]],
        columns.rows[keep],
        columns.dim,
    )


def moved(columns: Columns, name: str, by: int) -> Columns:
    values = getattr(columns.rows, name).copy()
    values[3] += by
    return replace(columns, rows=replace(columns.rows, **{name: values}))


def test_a_run_is_right(whole: Path):
    assert problems(whole) == []


def test_rewriting_alone_is_no_fault(folder: Path):
    rewrite(folder, lambda columns, footer: (columns, footer))
    assert problems(folder) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c, f: (without_row(c, 2), f), "1 positions that the law keeps are missing"),
        (lambda c, f: (moved(c, "position", 1), f), "positions that the law does not keep"),
        (lambda c, f: (moved(c, "position", 5000), f), "beyond the end of their document"),
        (lambda c, f: (moved(c, "example_id", 1), f), "examples.parquet does not list"),
        (lambda c, f: (moved(c, "bucket", 1), f), "do not have the bucket of their position"),
        (lambda c, f: (c, replace(f, seed=8)), "its footer says seed=8"),
        (lambda c, f: (c, replace(f, sampler={**f.sampler, "base_rate": 2.0})), "its footer says sampler="),
    ],
)
def test_rows_that_break_the_law_are_found(folder: Path, change, named: str):
    """Even where the manifest, checksums included, agrees with the file."""
    rewrite(folder, change)
    found = problems(folder)
    assert found and any(named in line for line in found), found
    assert all("\n" not in line for line in found)


def test_rows_out_of_order_are_found(folder: Path):
    manifest = Manifest.load(folder)
    part = manifest.parts[0]
    table = pq.ParquetFile(folder / part.path).read()
    first = table.slice(0, len(table) // len(manifest.selection[part.layer][part.kind]))
    schema = row_schema([Column("vector", 8)]).with_metadata(pq.read_schema(folder / part.path).metadata)
    with pq.ParquetWriter(folder / part.path, schema, **parquet_options([Column("vector", 8)], "none")) as writer:
        for head in range(4):
            piece = first.take(list(range(len(first)))[::-1])
            heads = np.full(len(piece), head, dtype=np.int16)
            writer.write_table(piece.set_column(0, schema.field("head"), [heads]).cast(schema))
    with (folder / part.path).open("rb") as file, (folder / "copy").open("wb") as out:
        hashed = HashedFile(out)
        hashed.write(file.read())
    (folder / "copy").unlink()
    mended = replace(part, bytes=hashed.bytes, sha256=hashed.sha256)
    replace(manifest, parts=(mended, *manifest.parts[1:])).save(folder)
    assert any("not in order" in line for line in problems(folder))


@pytest.mark.parametrize(
    ("path", "word"),
    [("captures/layer=01/kind=q/part-00001.parquet", "part-00001"), ("examples.parquet", "examples.parquet")],
)
def test_a_changed_cut_or_missing_file_is_named(folder: Path, path: str, word: str):
    file = folder / path
    content = file.read_bytes()
    for damaged in (content[:-1], content[:50] + bytes([content[50] ^ 1]) + content[51:], None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert any(word in line for line in problems(folder))
        file.write_bytes(content)
    assert problems(folder) == []


def test_a_foreign_file_is_named(folder: Path):
    (folder / "captures" / "extra.parquet").write_bytes(b"")
    (folder / "notes.md").write_text("mine")
    assert [line.split(":")[0] for line in problems(folder)] == ["captures/extra.parquet", "notes.md"]


def test_a_changed_configuration_is_found(folder: Path):
    for name in ("config.yaml", "rerun.yaml"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("seed: 0", "seed: 1"))
        assert any(name in line for line in problems(folder))
        (folder / name).write_text(text)
    assert problems(folder) == []


def test_a_missing_shard_is_named(runs: Runs):
    manifests = {
        index: Manifest.load(runs.start(f"shard-{index}", f"dataset.shard.index={index}", "dataset.shard.count=3"))
        for index in range(3)
    }
    assert missing_shards(list(manifests.values())) == []
    assert missing_shards([manifests[0], manifests[2]]) == ["shard 1 of 3 is missing"]
    assert missing_shards([Manifest.load(runs.place / "shard-0")]) == [
        "shard 1 of 3 is missing",
        "shard 2 of 3 is missing",
    ]


def test_a_run_reproduces_itself(whole: Path, tmp_path: Path):
    identical, lines = reproduce(whole, tmp_path / "again", Trust())
    assert identical and "identical" in lines[0]
    assert problems(tmp_path / "again") == []
    with pytest.raises(RunError, match="exists already"):
        reproduce(whole, tmp_path / "again", Trust())


def test_a_reproduction_that_fails_stands_in_no_ones_way(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "a" / "b" / "again"
    for failing in ("load", "draw"):
        with monkeypatch.context() as broken:
            if failing == "load":
                broken.setattr(Checkpoint, "load", lambda self: {}[0])
            else:
                broken.setattr(worker, "draw", lambda *_: {}[0])
            with pytest.raises(KeyError):
                reproduce(whole, target, Trust())
        assert list(tmp_path.iterdir()) == []
    assert reproduce(whole, target, Trust())[0]


def test_a_reproduction_that_has_rows_is_kept_for_a_resume(whole: Path, tmp_path: Path):
    target = tmp_path / "again"
    with stopping_after(3):
        reproduce(whole, target, Trust())
    assert Manifest.load(target).rows > 0
    resume(target, Trust())
    assert Manifest.load(target).digest == Manifest.load(whole).digest and problems(target) == []


def test_what_differs_is_told(runs: Runs, whole: Path):
    first, second = open_run(whole), open_run(runs.start("other", "batch.max_tokens=5000", "sampler.base_rate=25"))
    assert isinstance(first, Run) and isinstance(second, Run)
    distance = compare(first, second)
    assert distance.rows == first.manifest.rows and distance.only_first == 0
    assert distance.only_second == second.manifest.rows - first.manifest.rows > 0
    assert distance.largest < 1e-4
    same = compare(first, first)
    assert (same.rows, same.differing, same.largest) == (first.manifest.rows, 0, 0.0)


def test_a_copy_that_a_run_was_made_with_is_named(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """By verify and reproduce, with whether it is the one that is here."""
    copy = write_copy(tmp_path / "copies", llama_source())
    with imported(tmp_path / "copies"):
        folder = runs.start("by-a-copy")
    named = f"made with a hand-edited copy of {LLAMA} ({code_of(Manifest.load(folder))[LLAMA].split(', ')[1]})"
    monkeypatch.setattr(finder, "COPIES", tmp_path / "copies")
    for told_state in ("here too", "here is another one", "not here"):
        assert verify_all(folder) == 0
        assert f"{named}, {told_state}" in capsys.readouterr().out
        copy.write_text("other") if told_state == "here too" else copy.unlink(missing_ok=True)
    identical, lines = reproduce(folder, tmp_path / "again", Trust())
    assert identical and f"{named}, not here" in lines[1] and "local copy" in lines[2]


def test_an_unfinished_run_is_not_reproduced(runs: Runs, tmp_path: Path):
    stopped = runs.start("stopped", stop_after=1)
    with pytest.raises(RunError, match="resume"):
        reproduce(stopped, tmp_path / "again", Trust())


def test_threads_are_given_back():
    import torch

    before = torch.get_num_threads()
    with same_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_exported_heads_hold_the_same_rows(whole: Path, tmp_path: Path):
    target = tmp_path / "heads"
    assert export(whole, target) == 2 * (4 + 2) == len(list(target.iterdir()))
    run, total = open_run(whole), 0
    assert isinstance(run, Run)
    for layer in run.layers:
        for kind in run.kinds:
            for head in run.heads(layer, kind):
                table = pl.read_parquet(target / f"l{layer:02d}h{head:02d}{kind}" / "data.parquet")
                assert table.columns == ["bucket", "example_id", "position", "vector", "sliding_window"]
                expected = run.vectors(layer=layer, head=head, kind=kind)
                assert np.array_equal(np.array(table["vector"].to_list(), dtype=np.float32), expected.vectors)
                assert table["position"].to_list() == expected.positions.tolist()
                assert table["example_id"].to_list() == expected.example_ids.tolist()
                assert table["sliding_window"].null_count() == len(table)
                total += len(table)
    assert total == run.manifest.rows
    with pytest.raises(RunError, match="exists already"):
        export(whole, target)


def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """As on a full disk, of which polars speaks in words of its own."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        code, _, error = told(capsys, "export", folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 1 and len(error.splitlines()) == 1 and "File too large" in error
    assert list(tmp_path.iterdir()) == [folder]


def test_sliding_windows_are_exported(tmp_path: Path):
    small = make_run(tmp_path / "run").folder
    manifest = Manifest.load(small)
    geometry = tuple(replace(layer, sliding_window=512) for layer in manifest.geometry)
    replace(manifest, geometry=geometry).save(small)
    export(small, tmp_path / "heads")
    assert set(pl.read_parquet(tmp_path / "heads/l02h01k/data.parquet")["sliding_window"]) == {512}


def test_states_and_folders(whole: Path, folder: Path):
    manifest = replace(Manifest.load(folder), status="running")
    assert state(folder, manifest) == "killed"
    with hold(folder):
        assert state(folder, manifest) == "running"
    assert state(folder, Manifest.load(folder)) == "complete"
    assert run_folders(folder.parent) == [folder]


def test_age():
    assert age("2000-01-01T00:00:00+00:00").endswith("d")


def told(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = command.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_command_line(folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    code, out, _ = told(capsys, "list", folder.parent)
    assert code == 0 and all(word in out for word in ("run", "checkpoint", "LogUniform(20.0, 128)", "complete"))
    code, out, _ = told(capsys, "inspect", folder)
    assert code == 0 and all(word in out for word in ("digest", "bucket", "q 4/4", "forward"))
    assert told(capsys, "verify", folder)[0] == 0
    code, out, _ = told(capsys, "resume", folder)
    assert code == 0 and "nothing to do" in out
    assert told(capsys, "export", folder, "--layout", "heads")[0] == 0
    assert (tmp_path / "run_heads" / "l00h00q" / "data.parquet").exists()
    (folder / "notes").write_text("")
    code, out, _ = told(capsys, "verify", folder)
    assert code == 1 and "notes" in out and "1 thing is wrong" in out


def altered(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes a manifest as someone might who leaves its checksum out."""
    values = json.loads((folder / "manifest.json").read_text())
    del values["checksum"]
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


ODD_MANIFESTS = {
    "no time zone": lambda values: values.update(created="2020-01-01T00:00:00"),
    "a far future": lambda values: values.update(created="9999-12-31T23:59:59+00:00"),
    "no time": lambda values: values.update(created="yesterday"),
    "huge numbers": lambda values: [part.update(bytes=10**400, rows=10**400) for part in values["parts"]],
    "negative numbers": lambda values: [part.update(bytes=-(10**30), rows=-5) for part in values["parts"]],
    "a model of numbers": lambda values: values.update(model={"checkpoint": [10**400, None]}),
    "a sampler of nothing": lambda values: values.update(sampler={"_target_": None, "x": float("nan")}),
    "no counts": lambda values: values.update(counts={}, timings={"load": float("inf")}),
    "no JSON": None,
}


def test_the_list_and_inspect_say_that_weights_are_random(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, model in {
        "real": {"checkpoint": "owner/name", "weights": "pretrained"},
        "drawn": {"checkpoint": "owner/name", "weights": "random", "geometry": "stated by the configuration"},
        "default": {
            "checkpoint": "owner/name",
            "weights": "random",
            "geometry": "default",
            "tokenizer": {"class": "T", "sha256": "1", "source": "embedded:it", "stand_in": True},
        },
    }.items():
        altered(make_run(tmp_path / name).folder, lambda values, model=model: values.update(model=model))
    code, out, _ = told(capsys, "list", tmp_path)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert code == 0 and "random" not in lines["real"]
    assert "random name " in lines["drawn"] and "default" not in lines["drawn"]
    assert "random name, default shape" in lines["default"]
    _, out, _ = told(capsys, "inspect", tmp_path / "default")
    assert "geometry default" in out and "tokenizer of embedded:it, a stand-in" in out


def test_a_folder_that_cannot_be_read_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, change in ODD_MANIFESTS.items():
        folder = make_run(tmp_path / "odd" / name).folder
        if change is None:
            (folder / "manifest.json").write_text("[" * 100_000)
        else:
            altered(folder, change)
    make_run(tmp_path / "odd" / "a good one")
    (tmp_path / "odd" / "sweep").mkdir()
    (tmp_path / "odd" / "sweep" / "sweep.parquet").write_text("no table")
    code, out, _ = told(capsys, "list", tmp_path)
    lines = [line for line in out.splitlines() if "odd/" in line]
    assert code == 0 and len(lines) == len(ODD_MANIFESTS) + 2
    assert (
        sum("cannot be read" in line for line in lines) == 6
    )  # huge, negative and infinite numbers, no time, no JSON, no table
    assert any("odd/a good" in line and "tiny" in line for line in lines)


def test_the_list_counts_the_jobs_of_sweeps_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture):
    for name in ("2024", "sweep/0", "sweep/a/1", "sweep/0_reproduced", "others/7"):
        make_run(tmp_path / name)
    for name in ("sweep/0", "sweep/a/1", "sweep/a/2", "sweep/a/10"):  # of which two have no results
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text("[]")
    (tmp_path / "sweep" / "multirun.yaml").write_text("")
    code, out, _ = told(capsys, "list", tmp_path)
    assert code == 0
    assert [line.split("  ")[0] for line in map(str.strip, out.splitlines()[3:]) if line] == [
        "2024",
        "others/7",
        "sweep (sweep of 4, 2 without results)",
        "0",
        "a/1",
        "a/2",
        "a/10",
        "sweep/0_reproduced",
    ]


def test_an_error_of_the_command_line_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    for verb in ("list", "inspect", "verify", "resume", "reproduce", "export"):
        code, _, error = told(capsys, verb, tmp_path)
        assert code == 1 and len(error.splitlines()) == 1, error
        assert str(tmp_path) in error


def test_a_damaged_run_is_not_exported(folder: Path, tmp_path: Path):
    part = folder / Manifest.load(folder).parts[0].path
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(RunError, match=r"part-00000\.parquet has 100 bytes instead of"):
        export(folder, tmp_path / "heads")
    assert not (tmp_path / "heads").exists()


@pytest.mark.parametrize("verb", [["export"], ["reproduce"], ["publish", "owner/name", "--dry-run"]])
def test_a_folder_that_cannot_be_written_to_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, verb: list[str]
):
    (tmp_path / "file").write_text("")
    code, _, error = told(capsys, verb[0], folder, *verb[1:], "--to", tmp_path / "file" / "below")
    assert code == 1 and len(error.splitlines()) == 1 and "Not a directory" in error, error


def test_a_lost_configuration_is_named(folder: Path, capsys: pytest.CaptureFixture):
    (folder / "config.yaml").unlink()
    code, _, error = told(capsys, "reproduce", folder)
    assert code == 1 and "has no config.yaml" in error


def test_verbs_that_do_not_compute_do_not_import_torch(whole: Path):
    check = (
        "import sys; from sniffer.runs.__main__ import main; main(sys.argv[1:]);"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for verb in ("list", "inspect", "verify"):
        done = subprocess.run(
            [sys.executable, "-c", check, verb, str(whole)], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]", verb


def test_trust_is_given_on_the_command_line_only(whole: Path):
    plain = json.loads((whole / "manifest.json").read_text())["config"]
    assert saved.build(plain, Trust(), whole).seed == 0
    mine = plain | {"sampler": {"_target_": "tests.runs.test_runs.Mine"}}
    with pytest.raises(Exception, match="trusted_targets=\\[tests.\\]"):
        saved.build(mine, Trust(), whole)
    assert isinstance(saved.build(mine, Trust(["tests."]), whole).sampler, Mine)
    with pytest.raises(Exception, match="trusted_targets"):
        saved.build(plain | {"trusted_targets": ["tests."]} | {"sampler": mine["sampler"]}, Trust(), whole)


class Mine:
    """Not one of ours."""


def test_rows_of_the_reader_are_those_verified(whole: Path):
    assert len(rows(whole)) == Manifest.load(whole).rows
