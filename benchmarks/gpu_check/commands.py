"""What is done by the command line, in processes of its own: runs and their digests, memory, writing, tests."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu_check.place import Found, Place, batch_of
from benchmarks.measure import ROOT
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest

TESTS = (
    "tests/forward/test_transfer.py",
    "tests/forward/test_streams.py",
    "tests/models/test_kernels.py",
    "tests/models/test_devices.py",
    "tests/models/test_working_memory.py",
    "tests/process/test_devices.py",
)

TOO_MUCH = 1 << 50
"""Bytes that no device has."""

OUT_OF_MEMORY = f"""
import sys
import torch
where, device = sys.argv[1:3]
sys.argv = ["sniffer", *sys.argv[3:]]
from sniffer.models import finder
finder.install()
from sniffer.models.loaded import LoadedBackbone
from sniffer.forward.passes import Passes

def too_much(*_, **__):
    torch.empty({TOO_MUCH}, dtype=torch.uint8, device=device)

def after_three(self, *arguments):
    Passes.done = getattr(Passes, "done", 0) + 1
    return too_much() if Passes.done > 3 else run(self, *arguments)

run = Passes.run
if where == "loading":
    torch.nn.Module.to = too_much
elif where == "probe":
    LoadedBackbone.__call__ = too_much
else:
    Passes.run = after_three
from sniffer.__main__ import main
sys.exit(main())
"""
"""A run in which an allocation fails: a real error of the device's allocator, at a place of our choice."""


def tests(place: Place) -> Found:
    """Those that are about devices, the ones for CUDA among them."""
    done = _python("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *TESTS)
    print(done.stdout[-8000:], done.stderr[-2000:])
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    return {"exit code": done.returncode, "last line": last} | ({"failed": last} if done.returncode else {})


def runs(place: Place) -> Found:
    """A run is captured, verified, reproduced, interrupted and resumed: one digest."""
    from tests.tiny_run import overrides, save_checkpoint, save_texts

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(folder / "model", dtype="bfloat16", num_hidden_layers=4)
        texts = {str(n): f"document {n} " * (20 + 37 * n % 90) for n in range(12)}
        typed = overrides(folder / "model", save_texts(folder / "texts.jsonl", texts), "sampler=all")
        typed += [f"model.device={place.device}", "batch.max_tokens=2000"]

        def whole() -> dict[str, int]:
            run = str(folder / "run")
            codes = {"capture": _python("-m", "sniffer", *typed, f"hydra.run.dir={run}").returncode}
            codes["verify"] = _python("-m", "sniffer.runs", "verify", run).returncode
            again = ("reproduce", run, "--to", str(folder / "again"))
            return codes | {"reproduce": _python("-m", "sniffer.runs", *again).returncode}

        def in_parts() -> dict[str, int]:
            _interrupt([*typed, "output.checkpoint_every=1", f"hydra.run.dir={folder / 'part'}"], folder / "part")
            return {"resume": _python("-m", "sniffer.runs", "resume", str(folder / "part")).returncode}

        with ThreadPoolExecutor(2) as pool:
            codes: dict[str, int] = {}
            for done in [pool.submit(whole), pool.submit(in_parts)]:
                codes |= done.result()
        manifests = {one: Manifest.load(folder / one) for one in ("run", "again", "part")}
        digests = {name: manifest.digest for name, manifest in manifests.items()}
    equal = len(set(digests.values())) == 1 and not any(codes.values())
    found: Found = {"exit codes": codes, "digests": digests, "resumes": len(manifests["part"].resumes), "equal": equal}
    return found if equal else found | {"failed": "digests or exit codes differ"}


def _interrupt(typed: list[str], folder: Path) -> None:
    """Begins a run and stops it as soon as something is on disk."""
    running = subprocess.Popen([sys.executable, "-m", "sniffer", *typed], cwd=ROOT, stdout=subprocess.DEVNULL)
    while running.poll() is None and not list(folder.glob("captures/*/*/*.parquet")):
        time.sleep(0.01)
    running.terminate()
    running.wait()


def out_of_memory(place: Place) -> Found:
    """At three places: one line each that says what helps, and what was captured before it is kept."""
    found: Found = {}
    with tempfile.TemporaryDirectory() as name:
        for where in ("loading", "probe", "forward"):
            folder = Path(name, where)
            typed = _random_model(place, Path(name), 2, 8, 64 if place.full else 32)
            done = _python("-c", OUT_OF_MEMORY, where, str(place.device), *typed, f"hydra.run.dir={folder}")
            said = next((line for line in done.stderr.splitlines() if "out of memory" in line), done.stderr[-300:])
            found[where] = {"exit code": done.returncode, "said": said.strip()[:400]}
            good = done.returncode == 1 and "out of memory" in said
            if where == "forward" and (folder / RunFolder.MANIFEST).exists():
                manifest = Manifest.load(folder)
                found[where] |= {"status": manifest.status, "vectors kept": manifest.rows}
                good &= manifest.status == "interrupted" and manifest.rows > 0
            elif where == "forward":
                good = False
            if not good:
                print(done.stdout[-2000:], done.stderr[-4000:])
                found["failed"] = f"{where}: not told as it should be"
    return found


def everything(place: Place) -> Found:
    """sampler=all at an 8B model's attention: where the time goes, written at the end and while the device goes on."""
    layers, documents, tokens = (4, 16, 2048) if place.full else (2, 6, 64)
    found: Found = {}
    with tempfile.TemporaryDirectory() as name:
        typed = [*_random_model(place, Path(name), layers, documents, tokens), "sampler=all"]
        limit = "1GiB" if place.full else "100kB"
        for way, more in {"at the end": (), "beside the model": (f"output.memory_limit={limit}",)}.items():
            folder = Path(name, way.replace(" ", "-"))
            done = _python("-m", "sniffer", *typed, *more, f"hydra.run.dir={folder}")
            if done.returncode:
                print(done.stdout[-2000:], done.stderr[-4000:])
                return found | {"failed": f"{way}: exit code {done.returncode}"}
            manifest = Manifest.load(folder)
            seconds = {
                f"seconds, {stage}": manifest.timings.get(stage, 0.0) for stage in ("inference", "commit", "write")
            }
            busy = sum(seconds.values())
            speed = {"MB/s, all three": manifest.bytes / 1e6 / busy, "tokens/s, all three": documents * tokens / busy}
            found[way] = {"GB": manifest.bytes / 1e9, "parts": len(manifest.parts), **seconds, **speed}
            found.setdefault("digest", manifest.digest)
            if found["digest"] != manifest.digest:
                return found | {"failed": "the digests differ"}
    return found


def _random_model(place: Place, folder: Path, layers: int, documents: int, tokens: int) -> list[str]:
    """The command line of a model that is drawn at random, over documents of random tokens."""
    ids = folder / "ids.jsonl"
    batch = batch_of([tokens] * documents)
    ids.write_text("".join(f"{json.dumps({'ids': one.token_ids.tolist()})}\n" for one in batch.documents))
    shape = place.config("8B", num_hidden_layers=layers)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values = ", ".join(f"{name}: {getattr(shape, name)}" for name in (*names, "head_dim", "vocab_size"))
    return [
        "model=llama3",
        "model.weights=random",
        f"model.config_overrides={{{values}}}",
        "model.dtype=bfloat16",
        f"model.device={place.device}",
        "dataset=jsonl",
        f"dataset.path={ids}",
        "dataset.tokens_column=ids",
        f"batch.max_tokens={2 * tokens}",
    ]


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
