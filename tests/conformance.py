"""Every decoder in the installed transformers, tapped and compared with the original.

    python tests/conformance.py [--jobs N] [model_type ...]

For each causal-LM and image-text-to-text model type that can be built small, in fresh processes:

    identical   outputs of the tapped backbone equal the untapped one's to the bit, with and without pre kinds
    same        tapped q, k and v are the objects attention receives (LoadedBackbone proves it when it loads)
    pre         pre kinds equal the post kinds once every rotary function is the identity, and the first
                layer's pre kinds were the same before
    mask        dropping the mask changes nothing: the vectors of real tokens do not depend on padding

Ends with the counts, and by name what is not covered and why.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import multiprocessing
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import tiny_families as tiny
import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from models import finder
from models.loaded import LoadedBackbone, find_backbone
from models.shadow import ROTARY
from sniffer.errors import UnsupportedModelError
from sniffer.tap import Seen, tap

PATIENCE_S = 60
MEMORY_BYTES = 8 << 30


def model_types() -> list[str]:
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def run_tapped(model_type: str) -> dict[str, Any]:
    """The checks that need the taps, and a digest to compare with the untapped run."""
    finder.install()
    try:
        model = build(model_type)
    except Exception as error:
        return {"outcome": "not built", "reason": f"{short(error)} ({place_of(error)})"}
    backbone_module = find_backbone(model)
    path = next(name for name, part in model.named_modules() if part is backbone_module)
    backbone = LoadedBackbone(backbone_module)
    ids = tiny.tiny_ids()
    plain = digest(forward(backbone_module, ids))
    post_only, pre = [], []
    with torch.inference_mode(), tap(post_only.append):
        tapped = digest(forward(backbone_module, ids))
    with_pre = not backbone.pre_missing
    with torch.inference_mode(), tap(pre.append, pre=with_pre):
        tapped_pre = digest(forward(backbone_module, ids))
    return {
        "outcome": "tapped",
        "path": path,
        "digest": plain,
        "layers": len(backbone.geometry),
        "skipped": len(backbone.skipped_layers),
        "quiet": plain == tapped == tapped_pre,
        "pre": backbone.pre_missing or check_pre(backbone_module, pre, ids),
        "mask": check_padding(backbone_module, ids, pre),
    }


def run_untapped(model_type: str, path: str) -> dict[str, Any]:
    model = build(model_type)
    return {"digest": digest(forward(model.get_submodule(path), tiny.tiny_ids()))}


def build(model_type: str) -> Any:
    """With sdpa where the family has it: only then does attention go without a mask of its own."""
    config = tiny.tiny_config(model_type)
    try:
        return tiny.tiny_model(config)
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        return tiny.tiny_model(tiny.tiny_config(model_type), attn_implementation="eager")


def forward(module: torch.nn.Module, ids: torch.Tensor) -> Any:
    options = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}
    with torch.inference_mode():
        return module(input_ids=ids, **options)


def digest(output: Any) -> str:
    first = output[0] if isinstance(output[0], torch.Tensor) else output.last_hidden_state
    return hashlib.sha256(first.contiguous().numpy().tobytes()).hexdigest()


def check_pre(module: torch.nn.Module, rotated: list[Seen], ids: torch.Tensor) -> str:
    """Empty if the pre kinds are what attention receives when rotary is the identity."""
    straight: list[Seen] = []
    with rotary_as_identity(), torch.inference_mode(), tap(straight.append, pre=True):
        forward(module, ids)
    for event in straight:
        if not (torch.equal(event.q, event.q_pre) and torch.equal(event.k, event.k_pre)):
            return f"pre differs from post under identity rotary in {type(event.module).__name__}"
    first, now = rotated[0], straight[0]
    if not (torch.equal(first.q_pre, now.q) and torch.equal(first.k_pre, now.k)):
        return "pre of the first layer is not its post under identity rotary"
    turned = any(not torch.equal(event.q, event.q_pre) for event in rotated)
    rotates = any(ROTARY.search(inspect.getsource(type(event.module).forward)) for event in rotated)
    return "" if turned or not rotates else "rotary is applied but pre equals post everywhere"


@contextmanager
def rotary_as_identity() -> Iterator[None]:
    """Replaces the rotary functions of every imported family by ones that return their tensors unchanged."""
    undo = []
    for name, module in list(sys.modules.items()):
        if finder.is_modelling_module(name):
            for attribute, value in list(vars(module).items()):
                if inspect.isfunction(value) and ROTARY.search(attribute):
                    undo.append((module, attribute, value))
                    setattr(module, attribute, identity_like(value))
    try:
        yield
    finally:
        for module, attribute, value in undo:
            setattr(module, attribute, value)


def identity_like(function: Any) -> Any:
    names = list(inspect.signature(function).parameters)
    if names[1] in ("k", "xk", "key", "k_rot"):
        return lambda q, k, *args, **kwargs: (q, k)
    return lambda x, *args, **kwargs: x


def check_padding(module: torch.nn.Module, ids: torch.Tensor, seen: list[Seen]) -> str:
    padded: list[Seen] = []
    longer = torch.cat([ids, torch.full((len(ids), 5), 19)], dim=1)
    with torch.inference_mode(), tap(padded.append):
        forward(module, longer)
    worst = 0.0
    for short_event, long_event in zip(seen, padded, strict=True):
        for kind in ("q", "k", "v"):
            a, b = getattr(short_event, kind), getattr(long_event, kind)[:, :, : ids.shape[1]]
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)))
    return "" if worst < 1e-3 else f"padding changes real tokens by {worst:.1e}"


def check(model_type: str) -> dict[str, Any]:
    """One family: tapped, then untapped, each in a process of its own."""
    result = in_process(run_tapped, model_type)
    if result["outcome"] == "tapped":
        other = in_process(run_untapped, model_type, result["path"])
        result["identical"] = result["quiet"] and other.get("digest") == result["digest"]
    return {"model_type": model_type, **result}


def in_process(function: Any, *arguments: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        result = mine.recv() if mine.poll(PATIENCE_S) else {"outcome": "too slow", "reason": f"{PATIENCE_S} s"}
    except EOFError:
        result = {"outcome": "crashed", "reason": "the process died"}
    process.kill()
    process.join()
    return result


def _answer(pipe: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        pipe.send(function(*arguments))
    except UnsupportedModelError as error:
        pipe.send({"outcome": "refused", "reason": short(error)})
    except BaseException as error:
        pipe.send({"outcome": "failed", "reason": f"{short(error)} ({place_of(error)})"})


def place_of(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(where.filename).name}:{where.lineno}"


def short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    wanted = options.model_types or model_types()
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(check, model_type) for model_type in wanted]):
            results.append(done.result())
            print(describe(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(sorted(results, key=lambda result: result["model_type"]), indent=1))
    print_counts(results)
    return 0 if all(good(result) for result in results if result["outcome"] == "tapped") else 1


def good(result: dict[str, Any]) -> bool:
    return bool(result["identical"]) and not result["pre"] and not result["mask"]


def describe(result: dict[str, Any]) -> str:
    if result["outcome"] != "tapped":
        return f"{result['model_type']:28} {result['outcome']}: {result['reason']}"
    notes = [] if result["identical"] else ["NOT IDENTICAL"]
    notes += [f"{key}: {result[key]}" for key in ("pre", "mask") if result[key]]
    skipped = f" ({result['skipped']} skipped)" if result["skipped"] else ""
    return f"{result['model_type']:28} {result['layers']} layers{skipped} {'; '.join(notes) or 'ok'}"


def print_counts(results: list[dict[str, Any]]) -> None:
    outcomes = Counter(result["outcome"] for result in results)
    tapped = [result for result in results if result["outcome"] == "tapped"]
    print(f"\n{len(results)} model types: " + ", ".join(f"{n} {name}" for name, n in outcomes.most_common()))
    print(f"bit-identical {sum(bool(r['identical']) for r in tapped)} of {len(tapped)}")
    print(f"pre proven {sum(not r['pre'] for r in tapped)}, padding exact {sum(not r['mask'] for r in tapped)}")


if __name__ == "__main__":
    sys.exit(main())
