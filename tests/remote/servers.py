"""Runs at URLs, on a real S3 server and on one with the endpoints of the hub, both on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal

from sniffer import open_run
from sniffer.reader.run import Run
from sniffer.runs.__main__ import main
from sniffer.runs.verify import verify
from sniffer.storage import target
from sniffer.storage.layout import RunFolder
from sniffer.storage.remote import folder_at
from sniffer.storage.target import Sums, Target
from tests.helpers_remote import files_at, s3
from tests.helpers_storage import make_run


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3() as address:
        yield address


def test_a_run_on_a_real_server_is_the_run(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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


def test_checksums_are_those_that_stores_tell(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
