"""A mirror is the run as it was at a commit, never more; and nothing of anyone else is overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import yaml
from polars.testing import assert_frame_equal

from sniffer.config.saving import RERUN_DEFAULTS
from sniffer.config.trust import Trust, allowed, read_rerun
from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.runs.__main__ import main
from sniffer.runs.extend import extend
from sniffer.runs.mirror import mirror
from sniffer.runs.resume import resume
from sniffer.runs.verify import verify
from sniffer.storage import following
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.mirror import Mirror, state
from sniffer.storage.remote import folder_at
from sniffer.storage.target import Target
from tests.helpers_remote import files_at
from tests.helpers_runs import Runs, rows, save_place
from tests.helpers_storage import make_run


@pytest.fixture
def memory() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield "memory://bucket/run"
    system.store.clear()


def test_what_is_there_is_not_sent_again(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_run(tmp_path / "run", parts=3).folder
    honest, sent = Target.put, []

    def put(self: Target, content: bytes | Path, path: str) -> None:
        if len(sent) == 4:
            raise OSError(5, "the line is cut")
        sent.append(path)
        honest(self, content, path)

    manifest, content = Manifest.load(folder), (folder / RunFolder.MANIFEST).read_bytes()
    monkeypatch.setattr(Target, "put", put)
    with pytest.raises(OSError, match="the line is cut"):
        Mirror(folder, memory).bring(manifest, content)
    assert sent == [part.path for part in manifest.parts][:4] and {*sent} == files_at(memory).keys()
    first = sent[:]
    # One of them has not come over whole, and one is of another size.
    fsspec.filesystem("memory").pipe(f"{memory}/{first[1]}", bytes(len(files_at(memory)[first[1]])))
    fsspec.filesystem("memory").pipe(f"{memory}/{first[2]}", b"half")
    sent.clear()
    monkeypatch.setattr(Target, "put", lambda self, content, path: sent.append(path) or honest(self, content, path))
    mirror(folder, memory)
    assert first[1] in sent and first[2] in sent and first[0] not in sent and first[3] not in sent
    assert sent[-4:] == [RunFolder.EXAMPLES, *RunFolder.MANIFESTS, RunFolder.EXAMPLES_TWIN]
    assert verify(folder_at(memory))[1] == []
    sent.clear()
    mirror(folder, memory)
    assert not sent


def test_nothing_of_anyone_else_is_overwritten(memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, other = (make_run(tmp_path / name).folder for name in ("run", "other"))
    system = fsspec.filesystem("memory")
    system.pipe(f"{memory}/notes.txt", b"mine")
    for put, told in (
        (lambda: None, f"{memory} holds what is no run's, such as notes.txt: choose another URL"),
        (lambda: (system.rm(f"{memory}/notes.txt"), mirror(other, memory)), "holds another run, which was begun at 20"),
    ):
        put()
        before = files_at(memory)
        assert main(["mirror", str(folder), memory]) == 1 and told in capsys.readouterr().err
        assert files_at(memory) == before
    manifest = Manifest.load(other)
    replace(manifest, parts=manifest.parts[:1]).save(other)
    assert main(["mirror", str(other), memory]) == 1 and files_at(memory) == before
    assert "what is there is ahead, and is left as it is" in capsys.readouterr().err
    for url, told in (("https://host/run", "is no URL of a folder"), ("hf://models/a/b", "is no dataset of the hub")):
        assert main(["mirror", str(folder), url]) == 1 and told in capsys.readouterr().err


def test_what_is_damaged_here_is_not_copied(memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_run(tmp_path / "run").folder
    part = folder / Manifest.load(folder).parts[1].path
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert main(["mirror", str(folder), memory]) == 1
    assert f"{part} is missing or damaged: `python -m sniffer.runs resume {folder}` mends it" in capsys.readouterr().err
    assert RunFolder.MANIFEST not in files_at(memory)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_place(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def runs(place: Path, tmp_path: Path) -> Runs:
    return Runs(place / "checkpoint", place / "texts.jsonl", tmp_path)


OFTEN = "output.checkpoint_every=3"


def test_a_run_is_mirrored_as_it_goes_and_as_it_goes_on(memory: str, runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """At every moment what is there is a run, as this one was at a commit."""
    honest, seen = Target.put, []

    def put(self: Target, content: bytes | Path, path: str) -> None:
        honest(self, content, path)
        if path == RunFolder.MANIFEST:
            there = Run(folder_at(memory), Manifest.load(folder_at(memory)))
            seen.append((there.manifest.status, there.manifest.rows, there.scan().collect().height))
            if there.manifest.examples is not None:
                assert len(there.examples()) == there.manifest.counts["examples"]

    monkeypatch.setattr(Target, "put", put)
    folder = runs.start("run", OFTEN, f"output.mirror={memory}", stop_after=5)
    assert (
        seen[-1][0] == "interrupted"
        and files_at(memory)[RunFolder.MANIFEST] == (folder / RunFolder.MANIFEST).read_bytes()
    )
    with pytest.raises(RunError, match=f"would copy the run to {memory} .output.mirror.: add --mirror {memory}"):
        resume(folder, Trust())
    assert resume(folder, Trust(mirror=memory))
    assert seen[-1] == ("complete", *[Manifest.load(folder).rows] * 2) and len(seen) > 2
    assert all(rows == there for _, rows, there in seen) and sorted(rows for _, rows, _ in seen)[0] < seen[-1][1]
    assert verify(folder)[1] == verify(folder_at(memory))[1] == []
    told = state(folder, Manifest.load(folder))
    assert told == f"{memory}, which has all of it"
    assert extend(folder, Trust(mirror=memory)) is None
    assert_frame_equal(rows(folder), rows(folder_at(memory)))


@pytest.mark.long
def test_a_mirror_that_cannot_be_reached_costs_the_run_nothing(
    memory: str, runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(following, "FIRST_WAIT", 0.001)
    honest = Target.put

    def put(self: Target, content: bytes | Path, path: str) -> None:
        if "captures" in path:
            raise OSError(5, "the server is gone", path)
        honest(self, content, path)

    monkeypatch.setattr(Target, "put", put)
    folder = runs.start("run", OFTEN, f"output.mirror={memory}")
    manifest = Manifest.load(folder)
    assert manifest.status == "complete" and verify(folder)[1] == []
    warned = [record.getMessage() for record in caplog.records if memory in record.getMessage()]
    assert warned[0] == f"{memory} cannot be written to (the server is gone): the run goes on without"
    command = f"`python -m sniffer.runs mirror {folder} {memory}` catches up"
    assert "lags behind the run" in warned[-1] and warned[-1].endswith(command) and len(warned) < 5
    assert state(folder, manifest) == f"{memory}, which lags behind: {command}"
    assert Manifest.load(folder_at(memory), parts_must_exist=False).rows < manifest.rows
    monkeypatch.setattr(Target, "put", honest)
    assert main(["mirror", str(folder), memory]) == 0
    assert state(folder, manifest) == f"{memory}, which has all of it" and verify(folder_at(memory))[1] == []
    # Another run there, and a place that cannot be written to, are met before anything is captured.
    monkeypatch.setattr("sniffer.capture.make_plan", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(RunError, match=f"output.mirror={memory} holds a run already: choose another URL"):
        runs.start("other", f"output.mirror={memory}")
    with pytest.raises(RunError, match="output.mirror=https://host/run is no URL of a folder"):
        runs.start("third", "output.mirror=https://host/run")


def test_a_saved_mirror_is_asked_for_again(memory: str, tmp_path: Path):
    plain = {"output": {"mirror": memory, "tokens": True}}
    with pytest.raises(RunError, match=f"add --mirror {memory} if you trust it, or --mirror none to go on without"):
        allowed(plain, Trust(), tmp_path)
    assert allowed(plain, Trust(mirror="none"), tmp_path)["output"] == {"mirror": None, "tokens": True}
    assert allowed(plain, Trust(mirror="s3://b/c"), tmp_path)["output"]["mirror"] == "s3://b/c"
    (tmp_path / "rerun.yaml").write_text(yaml.safe_dump({"defaults": list(RERUN_DEFAULTS), **plain}))
    with pytest.raises(RunError, match="add output.mirror=URL for another place than .*, or output.mirror=null"):
        read_rerun(tmp_path, [])
    assert read_rerun(tmp_path, ["output.mirror=null"])
