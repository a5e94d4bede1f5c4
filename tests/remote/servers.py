"""Runs at URLs, on a real S3 server and on one with the endpoints of the hub, both on this machine."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from s3fs import S3FileSystem

from sniffer import open_run
from sniffer.config.trust import Trust
from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.runs.__main__ import main
from sniffer.runs.mirror import mirror
from sniffer.runs.resume import resume
from sniffer.runs.verify import verify
from sniffer.storage import target, urls
from sniffer.storage.away import away
from sniffer.storage.following import TRIES, Following, mirror_of
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.mirror import Mirror
from sniffer.storage.remote import folder_at
from sniffer.storage.target import Sums, Target, target_at
from tests.helpers_hub import asked_at, hub_here
from tests.helpers_remote import REFUSED, Server, files_at, s3
from tests.helpers_runs import Runs, save_place
from tests.helpers_storage import make_run


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3() as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_place(tmp_path_factory.mktemp("runs"))


def test_a_run_on_a_real_server_is_the_run(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, url = make_run(tmp_path / "run", parts=2).folder, "s3://bucket/runs/one"
    assert main(["mirror", str(folder), f"{url}/"]) == 0
    assert f"{url} has all of {folder}: " in capsys.readouterr().out
    for path, content in files_at(url).items():
        here = folder / (RunFolder.EXAMPLES if path == RunFolder.EXAMPLES_TWIN else path)
        assert content == here.read_bytes()
    here, there = open_run(folder), open_run(url)
    assert_frame_equal(here.scan().collect(), there.scan().collect())
    assert isinstance(there, Run) and len(there.vectors(layer=0, head=1, kind="k"))
    assert verify(folder_at(url))[1] == []
    assert main(["mirror", str(folder), url]) == 0 and "nothing had to be sent" in capsys.readouterr().out
    for words in (["inspect", url], ["list", "s3://bucket/runs"], ["verify", url], ["compare", url, str(folder)]):
        assert main(words) == 0
    assert "complete" in capsys.readouterr().out
    assert main(["export", url, "--to", str(tmp_path / "heads")]) == 0 and (tmp_path / "heads/l00h00q").is_dir()
    for words, told in (
        (["export", url], "give a folder of this machine with --to FOLDER"),
        (["resume", url], f"{url} is a URL, and resume needs a run of this machine"),
        (["verify", "s3://none/run"], "s3://none/run has no file: check the address and your access"),
        (["mirror", str(folder), "s3://none/run"], "s3://none/run cannot be written to"),
    ):
        assert main(words) == 1 and told in capsys.readouterr().err


def test_checksums_are_those_that_stores_tell(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "PIECE", 5 << 20)  # the least that S3 takes
    file = tmp_path / "large"
    file.write_bytes(bytes(range(256)) * (11 << 12))
    there, sums = Target("s3://bucket/sums"), Sums.of(file)
    there.put(file, "large")
    there.put(b"small", "small")
    assert "-3" in there.system.info("s3://bucket/sums/large")["ETag"]
    monkeypatch.setattr(Target, "_sha256", lambda *_: pytest.fail("what the store tells is enough"))
    assert there.holds("large", sums) and there.holds("small", Sums.of(b"small"))
    assert not there.holds("none", sums)
    monkeypatch.setattr(Target, "_sha256", lambda *_: "read back")
    assert not there.holds("small", Sums.of(b"other"))
    assert Sums.of(b"small").agree({"md5Hash": "65zzKacCbBQrxRAR8NwqpQ=="}) is False
    assert Sums.of(b"").agree({"md5Hash": "1B2M2Y8AsgTpgAmY7PhCfg=="})  # of RFC 1321, in base64
    assert Sums.of(b"").agree({"lfs": {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}})


@pytest.mark.parametrize("wrong", ["refused", "bucket", "gone", "hub", "offline"])
def test_what_cannot_be_written_to_is_told_before_a_run(
    server: Server, tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
):
    folder, url = make_run(tmp_path / "run").folder, f"s3://{'none' if wrong == 'bucket' else 'bucket'}/wrong"
    S3FileSystem.clear_instance_cache()
    if wrong == "refused":
        monkeypatch.setattr(server, "trouble", lambda method, path: REFUSED if method == "PUT" else None)
    elif wrong == "gone":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    elif wrong in ("hub", "offline"):
        url = "hf://datasets/some/one"
    with hub_here() as hub:
        if wrong == "hub":
            hub.token = "another"
        elif wrong == "offline":
            hub.down = True
        with pytest.raises(
            RunError, match=rf"^output.mirror={url} cannot be written to \(.+\): check the address"
        ) as told:
            mirror_of(folder, url, None)
    assert "\n" not in str(told.value)
    S3FileSystem.clear_instance_cache()


def test_a_run_that_is_lost_is_copied_back(server: Server, place: Path, tmp_path: Path):
    runs = Runs(place / "checkpoint", place / "texts.jsonl", tmp_path)
    folder, url = runs.start("run", "output.checkpoint_every=3", "output.mirror=s3://bucket/lost", stop_after=4), ""
    url = "s3://bucket/lost"
    shutil.rmtree(folder)
    for path, content in files_at(url).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    assert resume(folder, Trust(mirror=url))
    whole = verify(runs.start("whole"))[0]
    for there in (folder, folder_at(url)):
        manifest, problems = verify(there)
        assert problems == [] and (manifest.status, manifest.digest) == ("complete", whole.digest)


def test_a_run_on_the_hub(tmp_path: Path):
    folder, url = make_run(tmp_path / "run", parts=2, dims={"q": 512}).folder, "hf://datasets/some/one"
    with hub_here() as hub:
        assert main(["mirror", str(folder), url]) == 0
        assert hub.private and len(hub.commits) == 1  # all of it at once
        assert hub.files is not None and hub.files[RunFolder.MANIFEST] == (folder / RunFolder.MANIFEST).read_bytes()
        assert main(["mirror", str(folder), url]) == 0 and len(hub.commits) == 1
        assert verify(folder_at(url))[1] == []
        here, there = open_run(folder), open_run(url)
        assert_frame_equal(here.scan().collect(), there.scan().collect())
        there = open_run(url)
        hub.ranges.clear()
        assert isinstance(there, Run)
        vectors = there.vectors(layer=0, head=1, kind="q")
        # Of each part the footer, unless it is known by now, and the rows of one head.
        assert vectors.vectors.nbytes < sum(hub.ranges) < 1.3 * vectors.vectors.nbytes + 2 * (64 << 10)
        assert main(["mirror", str(folder), f"{url}/below"]) == 0
        assert verify(folder_at(f"{url}/below"))[1] == []


def test_a_run_on_a_branch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = make_run(tmp_path / "run", parts=2).folder
    with hub_here() as hub:
        for url in ("hf://datasets/some/one@tiny", "hf://datasets/some/one@tiny/below/it"):
            assert main(["mirror", str(folder), url]) == 0
            assert main(["mirror", str(folder), url]) == 0 and "nothing had to be sent" in capsys.readouterr().out
            assert verify(folder_at(url))[1] == []
            assert_frame_equal(open_run(folder).scan().collect(), open_run(url).scan().collect())
        assert hub.branches["main"] == {} and len(hub.commits) == 2
        assert {name.removeprefix("below/it/") for name in hub.branches["tiny"]} == files_at(f"{url}").keys()
        assert main(["list", "hf://datasets/some/one@tiny"]) == 0 and "complete" in capsys.readouterr().out
        for place in ("hf://datasets/some/one", "hf://datasets/some/one@none"):
            with pytest.raises(RunError, match=f"^{place} has no file: check the address and your access$"):
                open_run(place)
        # Parts leave for a branch, too.
        alone = make_run(tmp_path / "alone").folder
        replace(Manifest.load(alone), parts_at="hf://datasets/some/one@alone").save(alone)
        assert main(["mirror", str(alone), "hf://datasets/some/one@alone"]) == 0
        manifest = Manifest.load(alone, parts_must_exist=False)
        assert "parts removed here" in capsys.readouterr().out and len(away(alone, manifest)) == len(manifest.parts)
        assert verify(folder_at("hf://datasets/some/one@alone"))[1] == []


def test_what_is_put_and_taken_back_before_a_commit(tmp_path: Path):
    with hub_here() as hub:
        there = target_at("hf://datasets/some/one")
        there.make()
        for path in ("a", "b", "c"):
            there.put(path.encode(), path)
        there.remove(["b", "none"])
        there.settle()
        assert hub.files == {"a": b"a", "c": b"c"}
        there.remove(["a", "c"])
        there.put(b"new", "a")
        del hub.files["c"]
        there.settle()
        assert hub.files == {"a": b"new"} and not there.holds("b", Sums.of(b"b")) and there.holds("a", Sums.of(b"new"))


@contextmanager
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that takes connections, and never answers."""
    for name in ("SILENCE", "HUB_SILENCE"):
        monkeypatch.setattr(urls, name, 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        for name, value in Server(address=address).environment.items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        with asked_at(address):
            yield
    S3FileSystem.clear_instance_cache()


def test_a_server_that_never_answers_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, url = make_run(tmp_path / "run").folder, "s3://bucket/run"
    with silent(monkeypatch):
        with pytest.raises(RunError, match=f"^output.mirror={url} cannot be written to .it did not answer in time.: "):
            mirror_of(folder, url, None)
        with pytest.raises(RunError, match=f"^{url} cannot be written to .it did not answer in time.: what is there"):
            mirror(folder, url)
        with pytest.raises(RunError, match=f"^{url} cannot be listed: it did not answer in time; check the address"):
            folder_at(url)
        # Of the hub what asks without any limit of its own.
        there = target_at("hf://datasets/some/one")
        with pytest.raises(TimeoutError, match="it did not answer in time"):
            there.make()


def test_a_server_that_falls_silent_does_not_hold_a_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(urls, "SILENCE", 0.2)
    S3FileSystem.clear_instance_cache()
    folder, asked = make_run(tmp_path / "run").folder, []
    follow = Following(Mirror(folder, "s3://bucket/silent"))
    monkeypatch.setattr(server, "trouble", lambda method, path: asked.append(path) or 1.0)
    follow.saved(Manifest.load(folder))
    follow.finish(TRIES)
    said = "s3://bucket/silent lags behind the run (it did not answer in time): `python -m sniffer.runs mirror"
    assert caplog.records[-1].getMessage().startswith(said) and len(asked) <= 4
    S3FileSystem.clear_instance_cache()


def test_what_libraries_say_is_told_without_what_it_lets_anyone_do():
    said = "403 for url 'https://me:secret@host:9/b/key?X-Amz-Signature=abc&x=1', twice (http://h/k?sig=1)"
    with pytest.raises(OSError, match="403") as told_of, urls.told("s3://bucket/run"):
        raise ValueError(said)
    assert told_of.value.strerror == "403 for url 'https://host:9/b/key', twice (http://h/k)"
