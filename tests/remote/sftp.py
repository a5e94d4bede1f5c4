"""Runs behind an SSH server of this machine, whose files lie in folders that have to be there first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest
from polars.testing import assert_frame_equal

from sniffer import open_run
from sniffer.runs.__main__ import main
from tests.helpers_storage import make_run


class Anyone(asyncssh.SSHServer):
    """Takes every key."""

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return True


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a key in it."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    asyncssh.generate_private_key("ssh-rsa").write_private_key(home / ".ssh/id_rsa", "pkcs1-pem")
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def served(tmp_path: Path, home: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a server, and the folder that it serves."""
    folder, loop = tmp_path / "served", asyncio.new_event_loop()
    folder.mkdir()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=Anyone,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(folder)),
        )

    acceptor = asyncio.run_coroutine_threadsafe(begin(), loop).result()
    yield f"sftp://someone@127.0.0.1:{acceptor.get_port()}", folder

    async def end() -> None:
        acceptor.close()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_a_run_is_mirrored_and_read(served: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (server, files), run = served, make_run(tmp_path / "run", parts=2)
    url = f"{server}/runs/one"
    assert main(["mirror", str(run.folder), url]) == 0
    assert (files / "runs/one/manifest.json").read_bytes() == (run.folder / "manifest.json").read_bytes()
    assert_frame_equal(open_run(url).scan().collect(), open_run(run.folder).scan().collect())
    for words in (["verify", url], ["inspect", url], ["list", f"{server}/runs"]):
        assert main(words) == 0
    assert main(["mirror", str(run.folder), url]) == 0 and "nothing had to be sent" in capsys.readouterr().out
    part = next((files / "runs/one/captures").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    assert main(["mirror", str(run.folder), url]) == 0 and "1 files sent" in capsys.readouterr().out


def test_what_cannot_be_reached_is_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run")
    assert main(["mirror", str(run.folder), "sftp://someone@127.0.0.1:9/runs/one"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Unable to connect to port 9" in told
