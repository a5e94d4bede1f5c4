"""What is measured inside the process: kernels at new lengths, probes, waits, and vectors beside the processor's."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from sniffer.models import causality, kernels, selfcheck
from sniffer.models.compiled import compile_layers
from sniffer.models.loaded import LoadedBackbone
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check.place import Found, Place
from benchmarks.measure import circumstances
from sniffer.errors import UnsupportedModelError
from sniffer.process.devices import hardware
from sniffer.process.environment import versions
from sniffer.tap import Seen, tap

HEADS, KEYS, WIDTH = 32, 8, 128
"""Of an 8B model's attention."""

NEW_LENGTHS = 12

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 16},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
}


def environment(place: Place) -> Found:
    return {**hardware(place.device), **versions(), **circumstances()}


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
        found[name] = {f"ms, {when}": sorted(values)[len(values) // 2] for when, values in times.items()}
    return found


def probes(place: Place) -> Found:
    """How far a later token moves earlier ones, dense and with experts: by rounding, which must refuse neither."""
    found: Found = {}
    for family, more in FAMILIES.items():
        for dtype in (torch.bfloat16, torch.float16):
            said = f"{family} {str(dtype).removeprefix('torch.')}"
            try:
                backbone = place.same_model(dtype, family=family, **more)
            except UnsupportedModelError as error:
                found[said] = {"accepted": False, "why": str(error)}
                continue
            found[said] = {"accepted": True, **_moved(backbone, place)}
    return found


def _moved(backbone: LoadedBackbone, place: Place) -> Found:
    """Over the largest value of a layer, in the one that moves most: the changed text, and those beside it."""
    names = {part: name for name, part in backbone.module.named_modules()}
    ids = selfcheck.probe_ids(backbone.vocabulary, place.device, rows=causality.TEXTS)
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    one, two = (selfcheck.observe_probe(backbone, each, names, pre=False) for each in (ids, other))
    moved = [change[:, :-1] for _, change in causality.changes(one, two)]
    return {
        "the changed text moves by": max(float(change[0].max()) for change in moved),
        "texts beside it by": max(float(change[1:].max()) for change in moved),
    }


class Reads(TorchDispatchMode):
    """Counts operations whose result the host has to know, for which it would wait for a GPU, by where they are."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.__name__.partition(".")[0] in self.NAMES:
            self.found[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line that is neither of torch nor of this file."""
    frame = sys._getframe(2)
    while frame is not None and ("/torch/" in (file := frame.f_code.co_filename) or file == __file__):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}" if frame else "unknown"


def synchronisations(place: Place) -> Found:
    """What waits for the GPU in one forward with an open tap; on a processor, what would.

    All of them are transformers' own (docs/performance.md): none may be of a file of ours.
    """
    ids = torch.zeros(1, 512 if place.full else 32, dtype=torch.long, device=place.device)
    return {
        family: _waits(place.same_model(torch.bfloat16, family=family, **more), ids)
        for family, more in FAMILIES.items()
    }


def _waits(backbone: LoadedBackbone, ids: torch.Tensor) -> Found:
    shown(backbone, ids)
    with Reads() as reads:
        shown(backbone, ids)
    told: Found = {"reads of results": dict(reads.found)}
    if ids.device.type == "cuda":
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                shown(backbone, ids)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        told["waits"] = dict(Counter(f"{one.filename}:{one.lineno}" for one in waits))
    return told


def compiled(place: Place) -> Found:
    """Whether compiled layers are accepted, and how far they are from plain ones at the end."""
    backbone, ids = place.same_model(torch.bfloat16), torch.arange(64, device=place.device).view(2, 32)
    plain = shown(backbone, ids)
    began = time.perf_counter()
    compile_layers(backbone)
    return {
        "seconds to compile and prove": time.perf_counter() - began,
        "differ by": _apart(plain, shown(backbone, ids)),
    }


def beside_the_processor(place: Place) -> Found:
    """How far the vectors of the device are from those of the processor, over the largest of each layer."""
    ids, found = torch.arange(64).view(2, 32), {}
    for dtype in (torch.float32, torch.bfloat16):
        here, there = Place(torch.device("cpu"), place.full).same_model(dtype), place.same_model(dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"{name} differ by"] = _apart(shown(here, ids), shown(there, ids.to(place.device)))
    return found


@torch.inference_mode()
def shown(backbone: LoadedBackbone, ids: torch.Tensor) -> list[Seen]:
    seen: list[Seen] = []
    with tap(seen.append):
        backbone(ids)
    return seen


def _apart(some: list[Seen], others: list[Seen]) -> float:
    pairs = [(a.q.float().cpu(), b.q.float().cpu()) for a, b in zip(some, others, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
