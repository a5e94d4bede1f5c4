"""Sweeps, as `python -m sniffer -m` runs them in this process, on the tiny model."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import polars as pl
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from sniffer.models.backbone import Checkpoint

from sniffer import capture, open_run
from sniffer.__main__ import main
from sniffer.engine import worker
from sniffer.errors import RunError
from sniffer.forward.observer import Observer
from sniffer.reader.sweep import Sweep
from sniffer.runs.__main__ import main as runs_main
from sniffer.runs.verify import missing_shards, verify, verify_all
from sniffer.storage import following
from sniffer.storage.lock import hold
from sniffer.storage.manifest import Manifest
from sniffer.storage.remote import folder_at
from sniffer.storage.target import Target
from sniffer.tap import Seen
from tests.helpers_runs import ORDER, TEXTS, counting_forwards, stopping_after
from tests.tiny_run import overrides, save_texts

Invoke = Callable[..., int]

RATES = "sampler.base_rate=5,10,20"
KEY = ["job", *ORDER]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", TEXTS)


@pytest.fixture
def invoke(checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """`python -m sniffer -m ARGUMENTS` on the tiny model, into the folder `sweep`."""

    def call(*arguments: str) -> int:
        always = ["-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", "batch.max_tokens=300"]
        monkeypatch.setattr(sys, "argv", ["sniffer", *always, *overrides(checkpoint, texts, *arguments)])
        return main()

    monkeypatch.chdir(tmp_path)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield call
    logging.root.handlers[:], logging.root.level = handlers, level
    GlobalHydra.instance().clear()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "sweep"


def opened(place: Path) -> Sweep:
    sweep = open_run(place)
    assert isinstance(sweep, Sweep)
    return sweep


def index(place: Path) -> pl.DataFrame:
    return pl.read_parquet(place / "sweep.parquet")


def loads() -> tuple[list[str], object]:
    """Checkpoints whose weights are loaded, and a patch that notes them."""
    seen: list[str] = []
    honest = Checkpoint.load

    def load(self: Checkpoint):
        seen.append(self.dtype)
        return honest(self)

    return seen, patch.object(Checkpoint, "load", load)


def test_the_index_has_a_row_per_job(invoke: Invoke, place: Path, capsys: pytest.CaptureFixture):
    assert invoke(RATES, "capture.layers=[0],[1]") == 0
    jobs, sweep = index(place), opened(place)
    assert jobs["job"].to_list() == jobs["path"].to_list() == ["0", "1", "2", "3", "4", "5"]
    assert jobs["sampler.base_rate"].to_list() == [5, 5, 10, 10, 20, 20]
    assert jobs["capture.layers"].to_list() == ["[0]", "[1]"] * 3
    assert jobs["status"].unique().to_list() == ["complete"] and sweep.complete
    assert jobs["error"].to_list() == [None] * 6
    manifests = [run.manifest for run in sweep.runs.values()]
    assert jobs["rows"].to_list() == [manifest.rows for manifest in manifests]
    assert jobs["bytes"].to_list() == [manifest.bytes for manifest in manifests]
    assert all(seconds > 0 for seconds in jobs["seconds"])
    assert sweep.jobs().drop("path").equals(jobs.drop("path"))
    assert {"sweep.png", "sweep.svg"} <= {path.name for path in place.iterdir()}
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == str(place)
    assert all((place / job / "config.yaml").exists() for job in jobs["job"])


@pytest.mark.long
def test_a_seed_beyond_any_column_is_a_seed(invoke: Invoke, place: Path):
    seeds = ["1", str(2**64), "9" * 30]
    assert invoke(f"seed={','.join(seeds)}") == 0
    assert index(place)["seed"].to_list() == seeds
    assert opened(place).complete and opened(place).scan().collect()["seed"].unique().sort().to_list() == sorted(seeds)
    assert verify_all(place) == 0


def rows_of(*folders: Path) -> int:
    return sum(Manifest.load(folder).rows for folder in folders)


SUBDIRS = ["${hydra.job.num}", "a/b", "rate=${sampler.base_rate}/${seed}", "one/two/three/four/five/${seed}"]


@pytest.mark.long
@pytest.mark.parametrize("subdir", SUBDIRS)
def test_the_rows_of_a_sweep_are_those_of_its_jobs_wherever_they_lie(invoke: Invoke, place: Path, subdir: str):
    seeds = "seed=3" if subdir == "a/b" else "seed=3,4"
    assert invoke(seeds, f"hydra.sweep.subdir='{subdir}'") == 0
    jobs = sorted(file.parent for file in place.rglob("manifest.json"))
    sweep = opened(place)
    assert [place / name for name in sweep.runs] == jobs and len(jobs) == len(seeds.split(","))
    assert len(sweep.scan().collect()) == rows_of(*jobs) > 0
    assert sweep.scan().collect()["seed"].unique().sort().to_list() == [3, 4][: len(jobs)]
    assert index(place)["path"].to_list() == sweep.jobs()["job"].to_list() == list(sweep.runs)
    assert sweep.complete and verify_all(place) == 0
    (place / "sweep.parquet").unlink()  # the records of the jobs tell as much, down to where folders are searched
    if "five" not in subdir:
        assert list(opened(place).runs) == list(sweep.runs)


@pytest.mark.long
def test_what_verbs_put_beside_a_job_is_no_job(
    invoke: Invoke, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert invoke("seed=3,4", "hydra.sweep.subdir='jobs/${seed}'") == 0
    job = place / "jobs" / "3"
    rows = rows_of(job, place / "jobs" / "4")
    for verb in (
        ["reproduce"],
        ["reproduce", "--to", place / "again"],
        ["publish", "some/one", "--dry-run"],
        ["export"],
    ):
        assert runs_main([str(word) for word in [verb[0], job, *verb[1:]]]) == 0
    monkeypatch.setattr(sys, "argv", ["sniffer", "-cd", str(job), "-cn", "rerun", f"hydra.run.dir={place / '7'}"])
    assert main() == 0
    beside = {"jobs/3_reproduced", "again", "jobs/3_published", "7"}
    assert all((place / name / "manifest.json").exists() for name in beside)
    for _ in range(2):
        sweep = opened(place)
        assert list(sweep.runs) == sweep.jobs()["job"].to_list() == ["jobs/3", "jobs/4"]
        assert len(sweep.scan().collect()) == rows
        assert verify_all(place) == 0
        capsys.readouterr()
        assert runs_main(["list", str(place)]) == 0
        shown = capsys.readouterr().out
        assert "sweep (sweep of 2)" in shown and all(name in shown for name in beside)
        (place / "sweep.parquet").unlink(missing_ok=True)
    assert invoke("seed=3,4", "hydra.sweep.subdir='jobs/${seed}'") == 0
    assert capsys.readouterr().out.count("skipped") == 2


@pytest.mark.long
def test_a_figure_that_cannot_be_drawn_costs_no_job(
    invoke: Invoke, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sniffer.sweep.job.draw_sweep", full)
    assert invoke("seed=3") == 0
    assert "no figure of the sweep: OSError" in capsys.readouterr().out and opened(place).complete


@pytest.mark.long
def test_positions_nest_across_base_rates(invoke: Invoke, place: Path):
    assert invoke(RATES) == 0
    rows = opened(place).scan().select("sampler.base_rate", *ORDER).collect()
    kept = [set(rows.filter(pl.col("sampler.base_rate") == rate).select(ORDER).iter_rows()) for rate in (5, 10, 20)]
    assert kept[0] < kept[1] < kept[2]


def test_a_failed_job_does_not_stop_the_others(invoke: Invoke, place: Path, capsys: pytest.CaptureFixture):
    assert invoke("sampler.base_rate=5,-1,20") == 1
    assert index(place)["status"].to_list() == ["complete", "failed", "complete"]
    assert "base_rate=-1" in index(place)["error"][1]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "1 of 3 jobs" in told[0] and "base_rate=-1" in told[0]
    sweep = opened(place)
    assert list(sweep.runs) == ["0", "2"] and not sweep.complete
    assert sweep.jobs()["status"].to_list() == ["complete", "failed", "complete"]
    assert set(sweep.scan().collect()["sampler.base_rate"]) == {5, 20}


@pytest.mark.long
def test_a_sweep_whose_jobs_all_failed_can_be_opened(invoke: Invoke, place: Path):
    assert invoke("sampler.base_rate=-2,-1") == 1
    assert opened(place).jobs()["status"].to_list() == ["failed", "failed"]
    assert opened(place).scan().collect().is_empty()


@pytest.mark.long
def test_any_exception_is_noted(invoke: Invoke, place: Path, monkeypatch: pytest.MonkeyPatch):
    honest = capture.make_plan

    def surprising(config, *rest, **more):
        if config.sampler.base_rate == 10:
            raise ZeroDivisionError("of all things")
        return honest(config, *rest, **more)

    monkeypatch.setattr(capture, "make_plan", surprising)
    assert invoke(RATES) == 1
    assert index(place)["status"].to_list() == ["complete", "failed", "complete"]
    assert index(place)["error"][1] == "ZeroDivisionError: of all things"
    assert "Traceback" in (place / "1" / "sniffer.log").read_text()
    monkeypatch.undo()


@pytest.mark.long
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("out of luck")])
def test_the_job_after_a_failed_one_finds_the_memory_free(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    """What the failed forward had made would else live as long as somebody knows its error."""
    honest, made, left = Observer.__call__, [], []

    def failing(self: Observer, seen: Seen) -> None:
        if not made:
            states = torch.zeros(1000)
            made.append(weakref.ref(states))
            raise error
        if not left:
            left.append(made[0]())
        honest(self, seen)

    monkeypatch.setattr(Observer, "__call__", failing)
    gc.disable()
    try:
        assert invoke("seed=1,2") == 1
    finally:
        gc.enable()
    assert left == [None]


@pytest.mark.long
def test_again_skips_what_is_complete_and_repeats_what_failed(
    invoke: Invoke, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    with monkeypatch.context() as broken:
        broken.setattr(capture, "select", lambda *_: 1 / 0)
        assert invoke("sampler.base_rate=5,10") == 1
    assert index(place)["status"].to_list() == ["failed", "failed"]
    assert invoke("sampler.base_rate=5,10") == 0
    before = snapshot(place)
    seen, noting = counting_forwards()
    capsys.readouterr()
    with noting:
        assert invoke("sampler.base_rate=5,10") == 0
    assert seen == [] and snapshot(place) == before
    assert capsys.readouterr().out.count("skipped") == 2


@pytest.mark.long
def test_again_catches_up_the_mirrors_of_what_is_complete(
    invoke: Invoke, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    words = "sampler.base_rate=5,10", "output.mirror=memory://sweep/${hydra:job.num}", "output.keep_local=false"
    honest = Target.put

    def put(self: Target, content: bytes | Path, path: str) -> None:
        if "captures" in path:
            raise OSError(5, "the server is gone", path)
        honest(self, content, path)

    monkeypatch.setattr(following, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(Target, "put", put)
    for _ in range(2):  # captured, and then skipped
        assert invoke(*words) == 0 and index(place)["status"].to_list() == ["complete"] * 2
        told = "".join(capsys.readouterr())
        assert told.count("the server is gone") >= 2 and told.count("catches up") == 2, told
        assert len(opened(place).runs) == 2
    monkeypatch.setattr(Target, "put", honest)
    seen, noting = counting_forwards()
    for caught_up in (2, 0):
        with noting:
            assert invoke(*words) == 0
        told = "".join(capsys.readouterr())
        assert not seen and told.count("skipped") == 2 and told.count(" parts removed here") == caught_up, told
    for job in range(2):
        assert verify(folder_at(f"memory://sweep/{job}"))[1] == [] and not list(place.glob(f"{job}/captures/*/*/*"))
    with pytest.raises(RunError, match="keeps its vectors elsewhere .* are at memory://sweep/0 alone"):
        open_run(place)


def test_again_resumes_what_was_interrupted(invoke: Invoke, place: Path):
    with stopping_after(2):  # in the first job; the others then stop before their first batch
        assert invoke(RATES) == 1
    assert index(place)["status"].to_list() == ["failed"] * 3
    there = [run.manifest.counts["examples"] for run in opened(place).runs.values()]
    assert there[0] > 0 and there[1:] == [0, 0]
    seen, noting = counting_forwards()
    with noting:
        assert invoke(RATES) == 0
    assert len(seen) == 3 * len(TEXTS) - sum(there)
    assert index(place)["status"].to_list() == ["complete"] * 3
    assert verify_all(place) == 0


def test_a_signal_stops_the_sweep_and_is_noted(invoke: Invoke, place: Path, monkeypatch: pytest.MonkeyPatch):
    honest, calls = worker.draw, []

    def draw(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*arguments)

    monkeypatch.setattr(worker, "draw", draw)
    assert invoke(RATES) == 128 + signal.SIGTERM
    assert index(place)["status"].to_list() == ["interrupted"]
    assert invoke(RATES) == 0
    assert index(place)["status"].to_list() == ["complete"] * 3


@pytest.mark.long
def test_a_killed_job_is_seen_and_resumed(invoke: Invoke, place: Path):
    assert invoke("sampler.base_rate=5,10") == 0
    before = open_run(place / "1").manifest.digest
    replace(Manifest.load(place / "1"), status="running").save(place / "1")  # what a kill leaves behind
    assert opened(place).jobs()["status"].to_list() == ["complete", "killed"]
    assert invoke("sampler.base_rate=5,10") == 0
    assert opened(place).complete and open_run(place / "1").manifest.digest == before


@pytest.mark.long
def test_results_of_another_sweep_are_not_touched(invoke: Invoke, place: Path):
    assert invoke("sampler.base_rate=5,10") == 0
    before = {path: content for path, content in snapshot(place).items() if "captures" in path}
    assert invoke("sampler.base_rate=5,7") == 1
    assert {path: content for path, content in snapshot(place).items() if "captures" in path} == before
    assert index(place)["status"].to_list() == ["complete", "failed"]
    assert "sampler.base_rate: 10 then, 7 now" in index(place)["error"][1]


@pytest.mark.long
def test_a_job_that_another_process_runs_is_left_to_it(invoke: Invoke, place: Path):
    (place / "1").mkdir(parents=True)
    with hold(place / "1"):
        assert invoke("sampler.base_rate=5,10") == 1
    assert index(place)["status"].to_list() == ["complete", "failed"]
    assert "another process" in index(place)["error"][1]


def test_the_model_is_loaded_once_for_jobs_that_share_it(invoke: Invoke, place: Path):
    seen, noting = loads()
    with noting:
        assert invoke("model.dtype=float32,bfloat16", "sampler.base_rate=5,10") == 0
    assert seen == ["float32", "bfloat16"]
    assert [run.manifest.device["dtype"] for run in opened(place).runs.values()] == ["float32"] * 2 + ["bfloat16"] * 2
    assert verify_all(place) == 0


@pytest.mark.long
def test_a_shared_model_gives_the_rows_of_a_fresh_one(invoke: Invoke, place: Path):
    assert invoke("seed=1,2") == 0
    shared = [run.manifest.digest for run in opened(place).runs.values()]
    place.rename(place.with_name("first"))
    with patch("sniffer.engine.model_cache.LastModel.load", lambda self, checkpoint: checkpoint.load()):
        assert invoke("seed=1,2") == 0
    assert [run.manifest.digest for run in opened(place).runs.values()] == shared


def test_shards_are_the_single_run(invoke: Invoke, place: Path):
    whole = place.with_name("whole")
    assert invoke("dataset.shard.count=4", "dataset.shard.index=range(4)", "sampler.base_rate=9") == 0
    place.rename(place.with_name("shards"))
    assert invoke("sampler.base_rate=9") == 0
    place.rename(whole)
    shards, single = opened(place.with_name("shards")), opened(whole)
    rows = [sweep.scan().select(*ORDER, "bucket", "token_id").sort(ORDER).collect() for sweep in (shards, single)]
    assert rows[0].equals(rows[1]) and len(rows[0])
    assert sum(len(run.examples()) for run in shards.runs.values()) == len(TEXTS)


@pytest.mark.long
def test_verify_names_jobs_and_shards_that_are_missing(
    invoke: Invoke, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    honest = capture.check

    def failing(config):
        if config.dataset.shard.index == 1:
            raise RunError("this one is not to be")
        return honest(config)

    monkeypatch.setattr(capture, "check", failing)
    assert invoke("dataset.shard.count=3", "dataset.shard.index=range(3)") == 1
    capsys.readouterr()
    assert verify_all(place) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "job 1 has no results: failed (this one is not to be)",
        "shard 1 of 3 is missing",
    ]
    monkeypatch.undo()
    assert invoke("dataset.shard.count=3", "dataset.shard.index=range(3)") == 0
    assert verify_all(place) == 0
    shutil.rmtree(place / "2")
    capsys.readouterr()
    assert verify_all(place) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "job 2 is missing: sweep.parquet names it",
        "shard 2 of 3 is missing",
    ]


@pytest.mark.long
def test_shards_of_one_model_do_not_make_up_for_those_of_another(invoke: Invoke, place: Path):
    assert invoke("dataset.shard.count=2", "dataset.shard.index=0,1", "model.dtype=float32,bfloat16") == 0
    manifests = [run.manifest for run in opened(place).runs.values()]
    assert missing_shards(manifests) == []
    assert missing_shards([manifests[0], manifests[3]]) == ["shard 1 of 2 is missing", "shard 0 of 2 is missing"]


@pytest.mark.long
def test_a_shard_without_documents_is_an_empty_run(invoke: Invoke, place: Path):
    assert invoke("dataset.max_examples=2", "dataset.shard.count=4", "dataset.shard.index=range(4)") == 0
    assert [run.manifest.counts["examples"] for run in opened(place).runs.values()] == [1, 1, 0, 0]
    assert opened(place).runs["3"].scan().collect().is_empty()
    assert verify_all(place) == 0


@pytest.mark.long
def test_an_unreadable_index(invoke: Invoke, place: Path):
    assert invoke("sampler.base_rate=5,10") == 0
    (place / "sweep.parquet").write_bytes(b"no")
    with pytest.raises(RunError, match="remove it"):
        opened(place).jobs()


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but the index of the sweep and its figure."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent != folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.long
def test_again_with_other_weights_is_refused(invoke: Invoke, place: Path, tmp_path: Path, capsys, checkpoint: Path):
    mine = Path(shutil.copytree(checkpoint, tmp_path / "mine"))
    assert invoke("sampler.base_rate=5,10", f"model.checkpoint={mine}") == 0
    digests = [Manifest.load(place / job).digest for job in ("0", "1")]
    weights = mine / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert invoke("sampler.base_rate=5,10", f"model.checkpoint={mine}") == 1
    assert "holds results of another model (model.files.model.safetensors" in index(place)["error"][0]
    assert [Manifest.load(place / job).digest for job in ("0", "1")] == digests


@pytest.mark.long
def test_a_model_in_memory_whose_files_have_changed_is_loaded_anew(
    invoke: Invoke, place: Path, tmp_path: Path, checkpoint: Path
):
    """Between two jobs of one process: what the manifest says of the weights is what they were."""
    mine = Path(shutil.copytree(checkpoint, tmp_path / "mine"))
    honest = capture.run

    def run(*arguments, **named):
        honest(*arguments, **named)
        weights = mine / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")

    seen, noting = loads()
    with noting, patch.object(capture, "run", run):
        assert invoke("sampler.base_rate=5,5", f"model.checkpoint={mine}") == 0
    first, second = (Manifest.load(place / job) for job in ("0", "1"))
    assert len(seen) == 2 and first.model["files"] != second.model["files"]


@pytest.mark.long
def test_a_complete_job_made_with_another_copy_is_refused(invoke: Invoke, place: Path):
    assert invoke("sampler.base_rate=5,10") == 0
    manifest = Manifest.load(place / "0")
    code = dict.fromkeys(manifest.backbone["code"], "local copy, sha256:0")
    replace(manifest, backbone={**manifest.backbone, "code": code}).save(place / "0")
    assert invoke("sampler.base_rate=5,10") == 1
    assert "modeling_llama: local copy, sha256:0 then" in index(place)["error"][0]


@pytest.mark.long
def test_shards_of_another_model_are_told(invoke: Invoke, place: Path, capsys: pytest.CaptureFixture):
    assert invoke("dataset.shard.count=2", "dataset.shard.index=0,1") == 0
    assert verify_all(place) == 0
    manifest = Manifest.load(place / "1")
    files = {**manifest.model["files"], "model.safetensors": "sha256:0"}
    replace(manifest, model={**manifest.model, "files": files}).save(place / "1")
    capsys.readouterr()
    assert verify_all(place) == 1
    assert "shards 0 and 1 are not of the same model: model.files.model.safetensors" in capsys.readouterr().out
