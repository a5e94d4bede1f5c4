"""A user's files stay: what is not ours is neither replaced nor removed, and nothing is written through a link."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import yaml
from sniffer.experiments.common import entry, results

from sniffer.config.saving import save_plain
from sniffer.errors import RunError
from sniffer.reader.index import Job, table, update
from sniffer.runs import __main__ as verbs
from sniffer.runs.export import export
from sniffer.storage.durable import durable_file, temporary_for
from sniffer.storage.integrity import foreign, leftovers
from sniffer.storage.layout import RunFolder
from sniffer.storage.lock import hold, is_held
from sniffer.storage.manifest import Manifest
from sniffer.storage.ownership import never_began, refuse_foreign_sweep, strangers
from sniffer.sweep.figure import draw_sweep
from sniffer.terminal.logs import LogFile
from tests.helpers_storage import make_run

CHEAP = ["model=llama3", "model.weights=random", "dataset=pydoc"]
Invoke = Callable[..., int]


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every name below a folder, and what is in the files."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path): path.read_bytes() if path.is_file() else os.readlink(path) if path.is_symlink() else "folder"
        for path in paths
    }


def fill(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


THEIRS = [
    {"notes.txt": "mine"},
    {"config.yaml": "mine: 1\n"},
    {"config.yaml": "a: 1\n", "rerun.yaml": "b: 1\n", ".lock": ""},
    {"rerun.yaml": "b: 1\n"},
    {"examples.parquet": "mine"},
    {"sniffer.log": "mine"},
    {".lock": "1234"},
    {".hydra/config.yaml": "x: 1\n", ".hydra/hydra.yaml": "hydra: {}\n", ".hydra/overrides.yaml": "[]\n"},
    {"0/notes.txt": "mine"},
]


@pytest.mark.parametrize("files", THEIRS, ids=lambda files: "+".join(files))
def test_a_folder_of_someone_else_stays_as_it_is(
    invoke: Invoke, ran: list, tmp_path: Path, capsys: pytest.CaptureFixture, files: dict[str, str]
):
    before = snapshot(fill(tmp_path / "theirs", files))
    for words in (["hydra.run.dir=theirs"], ["-m", "hydra.sweep.dir=theirs", "seed=1,2"]):
        assert invoke(*words, *CHEAP) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "theirs holds what is no" in lines[0] and "choose a new" in lines[0], lines
        assert snapshot(tmp_path / "theirs") == before and ran == []


def test_a_job_of_a_sweep_leaves_such_a_folder_alone(invoke: Invoke, ran: list, tmp_path: Path, capsys):
    before = snapshot(fill(tmp_path / "sweep" / "0", {"config.yaml": "mine: 1\n", "notes/a": "b"}))
    update(tmp_path / "sweep")
    assert invoke("-m", *CHEAP, "hydra.sweep.dir=sweep", "seed=1,2") == 1
    assert "job 0: " in (error := capsys.readouterr().err) and "holds what is no run's (config.yaml, notes)" in error
    assert snapshot(tmp_path / "sweep" / "0") == before
    assert [config.seed for config in ran] == [2]


def test_what_a_stopped_or_killed_run_leaves_is_ours(invoke: Invoke, ran: list, tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("sniffer.cli.job.save_plain", stopped)
        assert invoke(*CHEAP, "hydra.run.dir=out") == 130
    assert (tmp_path / "out" / ".hydra").is_dir() and (tmp_path / "out" / ".lock").exists()
    (tmp_path / "out" / ".manifest.json.77.tmp").write_text("{")
    assert strangers(tmp_path / "out") == []
    assert invoke(*CHEAP, "hydra.run.dir=out") == 0
    for name in ("manifest.json", ".manifest.json"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / ".lock").touch()
    assert strangers(tmp_path / "out") == []
    assert invoke(*CHEAP, "hydra.run.dir=out") == 0 and len(ran) == 2


def test_wherever_it_is_killed_a_run_that_has_its_configuration_can_begin(tmp_path: Path, monkeypatch):
    """Each time that something of it has reached the disk, before there is a manifest, and the kill there."""
    written: list[dict[str, str]] = []
    run, honest = tmp_path / "run", os.fsync

    def fsync(handle: int) -> None:
        honest(handle)
        written.append({file.name: file.read_text() for file in run.iterdir()})

    run.mkdir()
    with hold(run), monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        save_plain(run, {"seed": 1})
    assert [len(files) for files in written] == [2, 2, 3, 3]
    for number, files in enumerate(written):
        folder = fill(tmp_path / str(number), files)
        assert strangers(folder) == [] and never_began(folder) == ("config.yaml" in files)


def test_a_sweep_may_be_begun_among_jobs_of_ours(tmp_path: Path):
    make_run(tmp_path / "a" / "0")
    (tmp_path / "a" / "1").mkdir()
    refuse_foreign_sweep(tmp_path / "a")
    fill(tmp_path / "a", {"nested/x=1/notes": ""})
    with pytest.raises(RunError, match=r"no sweep's \(nested\)"):
        refuse_foreign_sweep(tmp_path / "a")


@pytest.mark.long
@pytest.mark.parametrize("name", ["0", "multirun.yaml", "sweep.parquet", ".lock", "0/sniffer.log"])
def test_a_sweep_is_not_written_through_a_link(
    invoke: Invoke, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
):
    make_run(tmp_path / "sweep" / "0")
    update(tmp_path / "sweep")
    target, outside = tmp_path / "sweep" / name, tmp_path / "outside"
    target.rename(outside) if target.exists() else outside.write_text("mine")
    target.symlink_to(outside)
    before = snapshot(outside) or outside.read_bytes()
    assert invoke("-m", *CHEAP, "hydra.sweep.dir=sweep") == 1
    assert f"{target} is a link" in capsys.readouterr().err
    assert (snapshot(outside) or outside.read_bytes()) == before


def test_a_figure_takes_the_place_of_a_link(tmp_path: Path):
    pytest.importorskip("matplotlib")
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "sweep").mkdir()
    for name in ("sweep.png", "sweep.svg"):
        (tmp_path / "sweep" / name).symlink_to(tmp_path / "outside")
    draw_sweep(table([Job(str(n), {"seed": str(n)}, "complete", 1, 1, 1.0) for n in range(2)]), tmp_path / "sweep")
    assert (tmp_path / "outside").read_text() == "mine" and not (tmp_path / "sweep" / "sweep.png").is_symlink()


OTHERS = ".x.123.tmp", "notes/.data.csv.7.tmp", "other/.manifest.json.7.tmp", "captures/.part-00000.parquet.7.tmp"
OURS = (
    ".manifest.json.7.tmp",
    "..manifest.json.7.tmp",
    ".examples.parquet.7.tmp",
    ".config.yaml.7.tmp",
    "captures/layer=00/kind=q/.part-00009.parquet.7.tmp",
    "captures/layer=00/kind=q/part-00009.parquet",
)


def test_only_what_a_run_itself_was_writing_is_removed(tmp_path: Path):
    folder = make_run(tmp_path / "run").folder
    live = make_run(folder / "other").folder
    fill(folder, dict.fromkeys((*OTHERS, *OURS), "half"))
    fill(live, {"captures/layer=00/kind=q/.part-00009.parquet.7.tmp": "half"})
    manifest = Manifest.load(folder)
    assert set(leftovers(folder, manifest)) == set(OURS)
    assert set(OTHERS) <= set(foreign(folder, manifest))
    assert verbs.main(["resume", str(folder)]) == 0
    assert all((folder / name).exists() for name in OTHERS) and not any((folder / name).exists() for name in OURS)
    assert (live / "captures/layer=00/kind=q/.part-00009.parquet.7.tmp").exists()


def test_an_export_leaves_what_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_run(tmp_path / "run").folder
    before = snapshot(fill(tmp_path / ".heads.tmp", {"mine": "x"}))
    export(folder, tmp_path / "heads")
    assert snapshot(tmp_path / ".heads.tmp") == before

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
    with pytest.raises(OSError):
        export(folder, tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"run", ".heads.tmp", "heads"}


@pytest.mark.parametrize("link", ["experiments", "experiments/key_rank", "experiments/key_rank/findings.txt"])
def test_no_result_is_written_through_a_link(tmp_path: Path, link: str):
    folder = make_run(tmp_path / "run").folder
    outside = fill(tmp_path / "outside", {"findings.txt": "mine", "key_rank/findings.txt": "mine"})
    (folder / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / link).symlink_to(outside / "findings.txt" if link.endswith("txt") else outside)
    before = snapshot(outside)
    if link.endswith("txt"):
        results.put(folder / "experiments" / "key_rank", "findings.txt", b"ours")
        assert (folder / link).read_bytes() == b"ours"
    else:
        with pytest.raises(RunError, match="is a link"):
            entry.destination(None, folder, "key_rank")
    assert snapshot(outside) == before


def test_results_are_not_put_among_someones_files(tmp_path: Path):
    folder = make_run(tmp_path / "run").folder
    fill(
        tmp_path, {"paper/heads.parquet": "mine", "before/provenance.json": "{}", "run/experiments/key_rank/x.png": ""}
    )
    with pytest.raises(RunError, match="no result of ours"):
        entry.destination(str(tmp_path / "paper"), folder, "key_rank")
    for out in ("before", "new", "run/experiments/key_rank"):
        assert entry.destination(str(tmp_path / out), folder, "key_rank") == tmp_path / out


def test_a_copy_by_links_keeps_its_configuration(tmp_path: Path):
    folder = make_run(tmp_path / "run").folder
    for name in ("config.yaml", "rerun.yaml"):
        (folder / name).write_text("seed: 1\n")
        os.link(folder / name, tmp_path / name)
    save_plain(folder, {"seed": 2})
    assert [(tmp_path / name).read_text() for name in ("config.yaml", "rerun.yaml")] == ["seed: 1\n"] * 2
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"seed": 2}


@pytest.mark.parametrize("kind", ["link", "second name", "left by a kill"])
def test_nothing_is_written_through_the_name_that_a_file_has_first(tmp_path: Path, kind: str):
    """Whoever has many numbers of processes to try can put something where ours will write."""
    theirs, path = tmp_path / "theirs", tmp_path / "run" / "config.yaml"
    theirs.write_text("mine")
    path.parent.mkdir()
    match kind:
        case "link":
            temporary_for(path).symlink_to(theirs)
        case "second name":
            os.link(theirs, temporary_for(path))
        case _:
            temporary_for(path).write_text("half")
    with durable_file(path) as file:
        file.write(b"seed: 1")
    assert (theirs.read_text(), path.read_text()) == ("mine", "seed: 1")
    assert [one.name for one in path.parent.iterdir()] == [path.name] and not path.is_symlink()


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to(path.parent / "elsewhere")], ids=["fifo", "link"]
)
def test_a_lock_that_is_no_file_is_neither_waited_for_nor_followed(tmp_path: Path, make: Callable[[Path], None]):
    make(tmp_path / RunFolder.LOCK)
    assert not is_held(tmp_path)
    with pytest.raises(RunError, match="is a link, or no plain file"), hold(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [RunFolder.LOCK]


@pytest.mark.parametrize("name", ["sniffer.log", "config.yaml", ".lock"])
def test_no_resume_waits_for_a_reader(tmp_path: Path, name: str, capsys: pytest.CaptureFixture):
    folder = make_run(tmp_path / "run").folder
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert verbs.main(["resume", str(folder)]) == 1
    assert "no plain file" in capsys.readouterr().err


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.parent / "elsewhere")])
def test_a_log_that_is_no_file_is_neither_waited_for_nor_followed(tmp_path: Path, make: Callable[[Path], None]):
    make(tmp_path / "sniffer.log")
    log = LogFile(tmp_path / "sniffer.log", delay=True)
    log.emit(logging.makeLogRecord({"msg": "a line"}))
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["sniffer.log"]


@pytest.mark.parametrize("files", [{}, {"config.yaml": "seed: 0\n"}, {"notes.txt": ""}])
def test_a_verb_leaves_nothing_in_a_folder_of_someone_else(tmp_path: Path, files: dict[str, str]):
    before = snapshot(fill(tmp_path, files))
    assert verbs.main(["resume", str(tmp_path)]) == 1
    assert snapshot(tmp_path) == before


def test_a_run_that_is_whole_stays_so(tmp_path: Path):
    """What is checked above keeps nobody from mending their own."""
    folder = make_run(tmp_path / "run").folder
    (folder / ".manifest.json").unlink()
    replace(Manifest.load(folder)).save(folder)
    assert verbs.main(["resume", str(folder)]) == 0
