"""`make gpu-check`: what only a GPU can tell, in one command for the day when one is at hand; smaller on a processor.

    python -m benchmarks.gpu_check [--device DEVICE] [--minutes M] [PART ...]

A part that fails is told and noted, and the next one begins; none begins when the minutes are over. What was found lies
in gpu.json and gpu.txt, in the folder that $OUT names, or in outputs/gpu. Models are random weights of real shapes:
nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sniffer.models import causality, finder, kernels, selfcheck
from sniffer.models.compiled import compile_layers
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measure import ROOT, circumstances
from sniffer.errors import UnsupportedModelError, first_line
from sniffer.process.devices import hardware
from sniffer.process.environment import versions
from sniffer.process.memory import let_go
from sniffer.tap import Seen, tap

Found = dict[str, Any]

TESTS = ("tests/forward/test_transfer.py", "tests/models/test_kernels.py", "tests/models/test_devices.py")
HEADS, KEYS, WIDTH = 32, 8, 128
"""Of an 8B model's attention."""
NEW_LENGTHS = 12


@dataclass(frozen=True)
class Place:
    """Where it is measured, and how large: `full` on a GPU."""

    device: torch.device
    full: bool

    def model(self, family: str, dtype: torch.dtype, **more: Any) -> LoadedBackbone:
        """Random weights, drawn on the processor so that every machine has the same."""
        size = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "head_dim": 64}
        small = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
        shape = {"num_hidden_layers": 16 if self.full else 4, "num_key_value_heads": 4, "vocab_size": 4096}
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(size if self.full else small), **shape, **more)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).to(self.device).eval()
        return LoadedBackbone(find_backbone(model), kernels.DEFAULT)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def environment(place: Place) -> Found:
    return {**hardware(place.device), **versions(), **circumstances()}


def tests(place: Place) -> Found:
    """Those that are about devices, the ones for CUDA among them."""
    done = _python("-m", "pytest", "-q", "-n", "0", *TESTS)
    return {"exit code": done.returncode, "last line": done.stdout.strip().splitlines()[-1]}


def runs(place: Place) -> Found:
    """A run is captured, verified, reproduced, interrupted and resumed: one digest."""
    from tests.tiny_run import overrides, save_checkpoint, save_texts

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(folder / "model", dtype="bfloat16", num_hidden_layers=4)
        texts = {str(n): f"document {n} " * (20 + 37 * n % 90) for n in range(40)}
        typed = overrides(folder / "model", save_texts(folder / "texts.jsonl", texts), "sampler=all")
        typed += [f"model.device={place.device}", "batch.max_tokens=2000"]
        codes = {"capture": _python("-m", "sniffer", *typed, f"hydra.run.dir={folder / 'run'}").returncode}
        codes["verify"] = _python("-m", "sniffer.runs", "verify", str(folder / "run")).returncode
        again = ["reproduce", str(folder / "run"), "--to", str(folder / "again")]
        codes["reproduce"] = _python("-m", "sniffer.runs", *again).returncode
        _interrupt([*typed, "output.checkpoint_every=1", f"hydra.run.dir={folder / 'part'}"], folder / "part")
        codes["resume"] = _python("-m", "sniffer.runs", "resume", str(folder / "part")).returncode
        digests = {one: _digest(folder / one) for one in ("run", "again", "part")}
    return {"exit codes": codes, "digests": digests, "equal": len(set(digests.values())) == 1}


def _interrupt(typed: list[str], folder: Path) -> None:
    """Begins a run and stops it as soon as something is on disk."""
    running = subprocess.Popen([sys.executable, "-m", "sniffer", *typed], cwd=ROOT, stdout=subprocess.DEVNULL)
    while running.poll() is None and not list(folder.glob("captures/*/*/*.parquet")):
        time.sleep(0.01)
    running.terminate()
    running.wait()


def _digest(folder: Path) -> str:
    from sniffer.storage.manifest import Manifest

    return Manifest.load(folder).digest


def new_lengths(place: Place) -> Found:
    """Milliseconds of attention at a length that it has not met, and of the same length again, by kernels."""
    found: Found = {}
    dtype = torch.bfloat16 if place.full else torch.float32
    for number, (name, allowed) in enumerate({"without cudnn": kernels.DEFAULT, "cudnn": ("cudnn", "math")}.items()):
        times: dict[str, list[float]] = {"first": [], "again": []}
        for n in range(NEW_LENGTHS):
            length = (1024 if place.full else 64) + 2 * n + number
            q, k = (torch.randn(1, heads, length, WIDTH, dtype=dtype, device=place.device) for heads in (HEADS, KEYS))
            for when in times:
                place.wait()
                began = time.perf_counter()
                with kernels.allowed(allowed, place.device):
                    torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
                place.wait()
                times[when].append(1000 * (time.perf_counter() - began))
        found[name] = {when: sorted(values)[len(values) // 2] for when, values in times.items()}
    return found


def probes(place: Place) -> Found:
    """How far a later token moves earlier ones, dense and with experts: by rounding, which must refuse neither."""
    found: Found = {}
    families: dict[str, Found] = {"llama": {}, "qwen3_moe": {"num_experts": 16, "moe_intermediate_size": 256}}
    for family, more in families.items():
        for dtype in (torch.bfloat16, torch.float16):
            said = f"{family} {str(dtype).removeprefix('torch.')}"
            try:
                backbone = place.model(family, dtype, **more)
            except UnsupportedModelError as error:
                found[said] = {"accepted": False, "why": str(error)}
                continue
            names = {part: name for name, part in backbone.module.named_modules()}
            ids = selfcheck.probe_ids(backbone.vocabulary, place.device, rows=causality.TEXTS)
            other = ids.clone()
            other[:, -1] = ids[:, 0]
            one, two = (selfcheck.observe_probe(backbone, each, names, pre=False) for each in (ids, other))
            moved = [float(change[:, :-1].max()) for _, change in causality.changes(one, two)]
            found[said] = {"accepted": True, "largest": max(moved)}
    return found


def synchronisations(place: Place) -> Found:
    """What waits for the GPU in one forward with an open tap; transformers' own waits are among them."""
    if place.device.type != "cuda":
        return {"skipped": "no CUDA"}
    import warnings

    backbone, ids = place.model("llama", torch.bfloat16), torch.zeros(1, 512, dtype=torch.long, device=place.device)
    _shown(backbone, ids)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _shown(backbone, ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": len(waits), "where": sorted({f"{one.filename}:{one.lineno}" for one in waits})}


def compiled(place: Place) -> Found:
    """Whether compiled layers are accepted, and how far they are from plain ones at the end."""
    backbone, ids = place.model("llama", torch.bfloat16), torch.arange(64, device=place.device).view(2, 32)
    plain = _shown(backbone, ids)
    compile_layers(backbone)
    return {"differ by": _apart(plain, _shown(backbone, ids))}


def beside_the_processor(place: Place) -> Found:
    """How far the vectors of the device are from those of the processor, over the largest of each layer."""
    ids = torch.arange(64).view(2, 32)
    there, here = (
        place.model("llama", torch.float32),
        Place(torch.device("cpu"), place.full).model("llama", torch.float32),
    )
    return {"differ by": _apart(_shown(here, ids), _shown(there, ids.to(place.device)))}


@torch.inference_mode()
def _shown(backbone: LoadedBackbone, ids: torch.Tensor) -> list[Seen]:
    seen: list[Seen] = []
    with tap(seen.append):
        backbone(ids)
    return seen


def _apart(some: list[Seen], others: list[Seen]) -> float:
    pairs = [(a.q.float().cpu(), b.q.float().cpu()) for a, b in zip(some, others, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


PARTS: dict[str, Callable[[Place], Found]] = {
    part.__name__: part
    for part in (environment, runs, new_lengths, probes, synchronisations, beside_the_processor, compiled, tests)
}


@contextmanager
def noted(found: dict[str, Found], name: str) -> Iterator[None]:
    """A part that fails is told and noted; what it held on the device is let go of."""
    began = time.monotonic()
    try:
        yield
    except Exception as error:
        found[name] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        let_go(error)
    found[name] = {**found.get(name, {}), "seconds": round(time.monotonic() - began, 1)}


def table(found: dict[str, Found]) -> str:
    """A line per value, indented under its part."""
    lines = []
    for name, values in found.items():
        lines += [name, *(f"    {key:<24} {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; without names all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    if set(arguments.parts) - set(PARTS):
        parser.error(f"choose parts from {', '.join(PARTS)}")
    finder.install()
    device = torch.device(arguments.device)
    place, until = Place(device, full=device.type == "cuda"), time.monotonic() + 60 * arguments.minutes
    out = Path(os.environ.get("OUT", ROOT / "outputs" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Found] = {}
    for name in arguments.parts or PARTS:
        if time.monotonic() > until:
            found[name] = {"skipped": "the time was over"}
        else:
            with noted(found, name):
                found[name] = PARTS[name](place)
        print(table({name: found[name]}), end="", flush=True)
        (out / "gpu.json").write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
        (out / "gpu.txt").write_text(table(found), encoding="utf-8")
    return int(any("failed" in values for values in found.values()))


if __name__ == "__main__":
    sys.exit(main())
