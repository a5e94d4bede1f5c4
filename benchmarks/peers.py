"""Other tools that capture q and k, on the same checkpoint and the same tokens: `make bench-peers`.

Each lives in an environment of its own in the cache folder, made by pip when it is first asked for. Both run the
whole model, with its language-model head, and keep every position of every layer after RoPE; so does the plain
forward that they are divided by. Ours is divided by the bare backbone, which it runs. What is the same for all is
the result, so the seconds themselves are compared too.

A peer that cannot be installed, or cannot load the checkpoint, is named and passed over.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sniffer.models import embedded

from benchmarks.bench import EVERY, Bench, Capture, real_batch
from benchmarks.measure import Figure, Timed, both, timed

LENGTHS = (512, 2048)
LOOP = Path(__file__).with_name("peer_loop.py")


@dataclass(frozen=True)
class Peer:
    """A package on PyPI, and what it needs beside it to load a checkpoint."""

    name: str
    version: str
    more: tuple[str, ...] = ()

    @property
    def requirements(self) -> list[str]:
        return [f"{self.name}=={self.version}", *self.more, f"torch=={torch.__version__.partition('+')[0]}"]


PEERS = (Peer("transformer-lens", "4.3.0"), Peer("nnsight", "0.8.1", more=("accelerate",)))


class PeerError(Exception):
    """Why a peer was not measured, in one line."""


@dataclass(frozen=True)
class Pace:
    """Interleaved forwards: plain ones, and ones with everything captured."""

    bare: list[Timed]
    capture: list[Timed]

    @property
    def ratios(self) -> list[Timed]:
        return [captured / bare for captured, bare in zip(self.capture, self.bare, strict=True)]

    @property
    def median(self) -> Timed:
        """Of the captures."""
        walls, cpus = [one.wall for one in self.capture], [one.cpu for one in self.capture]
        return Timed(statistics.median(walls), statistics.median(cpus))


def measure(repeats: int) -> list[Figure]:
    found = []
    for n in LENGTHS:
        ours = _ours(n, repeats)
        found += both(f"capture / bare backbone, 1 x {n}, QK-Sniffer", ours.ratios)
        for peer in PEERS:
            try:
                theirs = _theirs(peer, n, repeats)
            except PeerError as reason:
                print(f"{peer.name} {peer.version} was not measured: {reason}")
                continue
            found += both(f"capture / bare model, 1 x {n}, {peer.name} {peer.version}", theirs.ratios)
            slower = [one / ours.median for one in theirs.capture]
            found += both(f"its seconds / QK-Sniffer's, 1 x {n}, {peer.name} {peer.version}", slower)
    return found


@torch.inference_mode()
def _ours(n: int, repeats: int) -> Pace:
    bench = Bench(n)
    capture = Capture(EVERY, bench.batch, bench.backbone)
    bench.forward()
    bench.capture([capture])
    pace = Pace([], [])
    for _ in range(repeats):
        pace.bare.append(timed(bench.forward)[1])
        pace.capture.append(timed(bench.capture, [capture])[1])
    return pace


def _theirs(peer: Peer, n: int, repeats: int) -> Pace:
    """Runs peer_loop.py in the peer's environment.

    Raises:
        PeerError: it cannot be had, or does not run.
    """
    python = environment(peer)
    with TemporaryDirectory() as scratch:
        tokens = Path(scratch, "tokens.npy")
        np.save(tokens, real_batch([n]).input_ids())
        checkpoint = embedded.path("SmolLM2-135M-Instruct")
        command = [str(python), str(LOOP), peer.name, str(checkpoint), str(tokens), str(repeats)]
        # Of our own packages nothing may be in its way; nor does it need the network.
        settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=settings, cwd=scratch)
    if ended.returncode:
        raise PeerError(_last_line(ended.stderr))
    spent = json.loads(ended.stdout.splitlines()[-1])
    return Pace(*([Timed(*seconds) for seconds in spent[name]] for name in ("bare", "capture")))


def environment(peer: Peer) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there or holds another version.

    Raises:
        PeerError: pip cannot install it.
    """
    folder = embedded.cache_folder() / "peers" / peer.name
    python, holds = folder / "bin" / "python", folder / ".installed"
    wanted = " ".join(peer.requirements)
    if holds.exists() and holds.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {wanted} into {folder} ...", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.requirements]
    ended = subprocess.run(pip, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise PeerError(_last_line(ended.stderr))
    holds.write_text(wanted, encoding="utf-8")
    return python


def _last_line(text: str) -> str:
    """The last one that is about an error, where there is such a one."""
    lines = [line.strip()[:300] for line in text.splitlines() if line.strip()]
    return ([line for line in lines if "error" in line.lower()] or lines or ["it ended without a word"])[-1]
