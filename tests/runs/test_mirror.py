"""A mirror is the run as it was at a commit, never more; and nothing of anyone else is overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

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
from sniffer.storage.away import away
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


def test_parts_that_are_there_for_sure_leave_the_folder(
    memory: str, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """None goes before the manifest there names it; a stopped run goes on, and has the rows of one that was not."""
    honest, gone = Path.unlink, set[str]()

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".parquet" and "captures" in self.parts:
            there = Manifest.load(folder_at(memory))
            path = self.relative_to(runs.place / "run").as_posix()
            assert sha256(files_at(memory)[path]).hexdigest() in {part.sha256 for part in there.parts}
            gone.add(path)
        honest(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    folder = runs.start("run", OFTEN, f"output.mirror={memory}", "output.keep_local=false", stop_after=5)
    manifest = Manifest.load(folder, parts_must_exist=False)
    assert gone == {part.path for part in manifest.parts} and len({part.commit for part in manifest.parts}) > 1
    told = f"{len(gone)} of its {len(gone)} parts are at {memory} alone"
    for words, code, said in (
        (["inspect"], 0, told),
        (["list"], 0, "interrupted, rows at its mirror"),
        (["verify"], 0, f"{told}: `python -m sniffer.runs verify {memory}` reads all of it"),
        (["resume"], 1, f"{told}: add --mirror {memory} if you trust it"),
        (["resume", "--mirror", "none"], 1, f"{told}: add --mirror {memory} if you trust it"),
        (["export"], 1, f"{folder} keeps its vectors elsewhere ({told}): open that URL in its place"),
        (["mirror", f"{memory}-other"], 1, f"{memory}-other cannot have all of {folder}: {told}; copy that there"),
    ):
        verb, *more = words
        assert main([verb, str(folder), *more]) == code
        assert said in " ".join("".join(capsys.readouterr()).split())
    whole = Manifest.load(runs.start("whole"))
    assert resume(folder, Trust(mirror=memory))
    manifest = Manifest.load(folder, parts_must_exist=False)
    assert (manifest.status, manifest.digest) == ("complete", whole.digest) and not list(folder.glob("captures/*/*/*"))
    assert verify(folder_at(memory))[1] == verify(folder)[1] == []
    assert extend(folder, Trust(mirror=memory)) is None and not resume(folder, Trust(mirror=memory))
    # What the copy has lost is nowhere: it is captured again, and what is there of the same commit is not.
    lost = manifest.parts[0]
    fsspec.filesystem("memory").rm(f"{memory}/{lost.path}")
    (folder / RunFolder.MIRROR).unlink()
    assert (
        main(["mirror", str(folder), memory]) == 1 and f"has lost {lost.path}, which is now" in capsys.readouterr().err
    )
    before = {path for path in files_at(memory) if "captures" in path}
    assert resume(folder, Trust(mirror=memory))
    there, problems = verify(folder_at(memory))
    assert problems == [] and there.digest == whole.digest and before <= {part.path for part in there.parts}
    assert lost.path not in {part.path for part in there.parts}


def test_a_copy_that_lags_or_is_not_what_was_sent_keeps_parts_here(memory: str, tmp_path: Path):
    folder = make_run(tmp_path / "run").folder
    replace(Manifest.load(folder), parts_at=memory).save(folder)
    manifest, content = Manifest.load(folder), (folder / RunFolder.MANIFEST).read_bytes()
    honest, system = Mirror._let_go, fsspec.filesystem("memory")

    def spoilt(self: Mirror, *arguments: object) -> None:
        system.pipe(f"{memory}/{manifest.parts[1].path}", b"x" * manifest.parts[1].bytes)
        honest(self, *arguments)

    with patch.object(Mirror, "_let_go", spoilt), pytest.raises(OSError, match="is not there any more as it was sent"):
        Mirror(folder, memory, keep=False).bring(manifest, content)
    assert [part.path for part in away(folder, manifest)] == [manifest.parts[0].path]
    # The copy is told apart from one that was sent by another run meanwhile.
    other = replace(manifest, created="2020-01-01T00:00:00+00:00").content()
    system.pipe(f"{memory}/{RunFolder.MANIFEST}", other)
    with pytest.raises(RunError, match="holds another run, which was begun at 2020"):
        mirror(folder, memory)
    assert len(away(folder, manifest)) == 1


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
    with pytest.raises(RunError, match=r"^output.mirror=/nfs/run is no URL of a folder: wanted .*memory://$"):
        runs.start("fourth", "output.mirror=/nfs/run")


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
