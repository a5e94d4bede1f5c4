"""What is proven of one family, on a tiny random model of it.

Every check returns an empty string where it holds, else what it found. None of them trusts the taps: outputs
are compared with a process that never installed the hook, attention's inputs are seen by wrapping what
computes attention, and the pre kinds are compared with a model whose rotary functions have been replaced.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from sniffer.models import finder, witness
from sniffer.models.language_model import LoadedLanguageModel
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from sniffer.models.syntax import ROTARY
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from sniffer.errors import UnsupportedModelError
from sniffer.tap import Seen, StopForward, tap
from tests import tiny_families as tiny
from tests.conformance.attention import compared, statistics_of
from tests.conformance.lengths import check_batches, check_limits
from tests.conformance.scores import scores_of
from tests.helpers_overrides import changed_too_much

PADDING = 5
EXACT_ENOUGH = 1e-3
"""Relative difference that padding may make: masks and other batch shapes sum in another order."""
ONE_LENGTH = "prompts of one length"
"""Of a family whose generation is proven for prompts side by side only where these are equally long."""
QUERY, KEY, VALUE = (("q", "xq", "query", "query_layer"), ("k", "xk", "key", "k_rot", "key_layer"), ("value_layer",))


def run_tapped(model_type: str) -> dict[str, Any]:
    """All checks that need the taps, and a digest to compare with the untapped run."""
    finder.install()
    try:
        model = build(model_type)
    except Exception as error:
        return {"outcome": "not built", "reason": one_line(error)}
    try:
        module = find_backbone(model)
        backbone = LoadedBackbone(module)
    except UnsupportedModelError as error:
        return {"outcome": "refused", "reason": one_line(error)}
    ids = tiny.tiny_ids()
    plain = digest(forward(module, ids))
    (seen, post), (with_pre, pre) = watch(backbone, ids), watch(backbone, ids, pre=not backbone.pre_missing)
    return {
        "outcome": "tapped",
        "path": next(name for name, part in model.named_modules() if part is module),
        "digest": plain,
        "attention": module.config._attn_implementation,
        "layers": len(backbone.geometry),
        "skipped": len(backbone.skipped_layers),
        "windows": len({layer.sliding_window for layer in backbone.geometry} - {None}),
        "dims": sorted({layer.dims["q"] for layer in backbone.geometry}),
        "quiet": "" if plain == post == pre else "an open tap changes the output",
        "numbered": check_numbers(backbone, seen),
        "same": check_same(backbone, ids),
        "pre": backbone.pre_missing or check_pre(backbone, with_pre, ids),
        "mask": check_mask(backbone, ids),
        "early_exit": check_early_exit(backbone, ids, seen),
        "limits": check_limits(model, backbone),
        "batches": check_batches(partial(build, model_type)),
        "overrides": "; ".join(changed_too_much(model_type)[:1]),
        "statistics": statistics_of(backbone, ids),
        "scores": scores_of(build, model_type),
        "generates": generates(model, backbone),  # last, for it leaves the model without its generation config
    }


def generates(model: Any, backbone: LoadedBackbone) -> str:
    """Empty where its generation is proven, of prompts of any length; else of which, or why it is refused."""
    try:
        return "" if LoadedLanguageModel(model, backbone).pads else ONE_LENGTH
    except UnsupportedModelError as error:
        return one_line(error)


def run_untapped(model_type: str, path: str, statistics: list[dict[str, Any]]) -> dict[str, Any]:
    """The same model's output in a process without the hook, and whether its weights bear the statistics out."""
    module, ids = build(model_type).get_submodule(path), tiny.tiny_ids()
    same = {"digest": digest(forward(module, ids))}
    if not statistics:
        return same | {"exact": "none"}
    try:
        stepwise = tiny.tiny_model(tiny.tiny_config(model_type), attn_implementation="eager").get_submodule(path)
        return same | {"exact": compared(stepwise, ids, statistics)}
    except Exception as error:
        return same | {"exact": f"its weights cannot be had: {one_line(error)}"}


def build(model_type: str, change: Callable[[PretrainedConfig], None] = lambda config: None) -> Any:
    config = tiny.tiny_config(model_type)
    change(config)
    return built(config)


def built(config: PretrainedConfig) -> Any:
    """With sdpa where the family has it: only then does attention go without a mask of its own."""
    try:
        return tiny.tiny_model(copy.deepcopy(config))
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        return tiny.tiny_model(config, attn_implementation="eager")


def forward(module: torch.nn.Module, ids: Tensor, **more: Tensor) -> Any:
    options: dict[str, Any] = {"use_cache": False} if accepts(module, "use_cache") else {}
    with torch.inference_mode():
        return module(input_ids=ids, **options, **more)


def accepts(module: torch.nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def watch(backbone: LoadedBackbone, ids: Tensor, *, pre: bool = False, **more: Tensor) -> tuple[list[Seen], str]:
    """The events of one forward that belong to a layer, and the digest of its output."""
    seen: list[Seen] = []
    with tap(seen.append, pre=pre):
        output = digest(forward(backbone.module, ids, **more))
    return [event for event in seen if event.module in backbone.layer_of], output


def digest(output: Any) -> str:
    first = output[0] if isinstance(output[0], Tensor) else output.last_hidden_state
    return hashlib.sha256(first.contiguous().numpy().tobytes()).hexdigest()


def check_numbers(backbone: LoadedBackbone, seen: list[Seen]) -> str:
    """One event per attention layer; attending and skipped layers together are the config's layers."""
    numbers = [backbone.layer_of[event.module] for event in seen]
    if sorted(numbers) != [layer.layer for layer in backbone.geometry]:
        return f"events of layers {numbers} for the layers {[layer.layer for layer in backbone.geometry]}"
    text = tiny.text_of(backbone.module.config) or backbone.module.config
    depth = getattr(text, "decoder_layers", None) or getattr(text, "num_hidden_layers", None)
    found = len(backbone.geometry) + len(backbone.skipped_layers)
    if isinstance(depth, int) and found != depth:
        return f"{found} layers found, attending or skipped, where the config has {depth}"
    said = [getattr(event.module, "layer_idx", None) for event in seen]
    known = all(isinstance(index, int) and index >= 0 for index in said)
    return f"modules call themselves {said}, their places are {numbers}" if known and said != numbers else ""


class Products(TorchFunctionMode):
    """Keeps every tensor that goes into a product or a fused attention, whoever calls it."""

    NAMES = ("scaled_dot_product_attention", "matmul", "__matmul__", "bmm", "baddbmm", "einsum", "__rmatmul__")

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            values = [*args, *(kwargs or {}).values()]
            flat = [inner for value in values for inner in (value if isinstance(value, (list, tuple)) else [value])]
            self.factors += [value for value in flat if isinstance(value, Tensor)]
        return func(*args, **(kwargs or {}))


def check_same(backbone: LoadedBackbone, ids: Tensor) -> str:
    """Tapped tensors are those attention computes with.

    Where a family uses transformers' attention functions, these are wrapped, and must receive the very
    objects. Elsewhere the tensors must enter a product, as they are or as a view.
    """
    seen: list[Seen] = []
    products = Products()
    with witness.witnessed() as received, tap(seen.append), products:
        forward(backbone.module, ids)
    memory = {(factor.untyped_storage().data_ptr(), factor.numel()) for factor in products.factors}
    for event in [event for event in seen if event.module in backbone.layer_of]:
        calls = [call for call in received if call.module is event.module]
        if calls:
            if not any(event.q is call.q and event.k is call.k and event.v is call.v for call in calls):
                return f"{type(event.module).__name__} attends with other objects"
        else:
            for kind in ("q", "k", "v"):
                states = getattr(event, kind)
                if (states.untyped_storage().data_ptr(), states.numel()) not in memory:
                    return f"{kind} of {type(event.module).__name__} enters no product"
    return ""


def check_pre(backbone: LoadedBackbone, rotated: list[Seen], ids: Tensor) -> str:
    """Pre kinds are what attention receives when rotary is the identity."""
    with rotary_as_identity():
        straight, _ = watch(backbone, ids, pre=True)
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
    """Replaces the rotary functions of every imported family, static methods too, by the identity."""
    undo: list[tuple[Any, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if finder.is_modelling_module(name):
            owners = [module, *(value for value in vars(module).values() if inspect.isclass(value))]
            for owner in owners:
                for attribute, value in list(vars(owner).items()):
                    function = getattr(value, "__func__", value)
                    if inspect.isfunction(function) and ROTARY.search(attribute):
                        undo.append((owner, attribute, value))
                        straight = identity_like(function)
                        setattr(owner, attribute, staticmethod(straight) if inspect.isclass(owner) else straight)
    try:
        yield
    finally:
        for owner, attribute, value in undo:
            setattr(owner, attribute, value)


def identity_like(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns q, k (and v) as they came where the function takes them together, else its first argument."""
    names = list(inspect.signature(function).parameters)
    together = any(name in KEY for name in names[1:])

    def identity(*args: Any, **kwargs: Any) -> Any:
        given: Mapping[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        if not together:
            return args[0] if args else given[names[0]]
        named = [given.get(name) for words in (QUERY, KEY, VALUE) for name in names if name in words]
        found = [value for value in named if value is not None]
        return tuple(found) if len(found) > 1 else found[0]

    return identity


def check_mask(backbone: LoadedBackbone, ids: Tensor) -> str:
    """With padding on the right, real tokens have the same vectors with and without a mask, and unpadded."""
    padded = torch.cat([ids, torch.full((len(ids), PADDING), 19)], dim=1)
    runs = [watch(backbone, ids)[0], watch(backbone, padded)[0]]
    if accepts(backbone.module, "attention_mask"):
        mask = torch.ones_like(padded)
        mask[:, ids.shape[1] :] = 0
        runs.append(watch(backbone, padded, attention_mask=mask)[0])
    worst = 0.0
    for events in zip(*runs, strict=True):
        for kind in ("q", "k", "v"):
            real = [getattr(event, kind)[:, :, : ids.shape[1]] for event in events]
            scale = real[0].abs().max().clamp(min=1e-6)
            worst = max(worst, *(float((other - real[0]).abs().max() / scale) for other in real[1:]))
    return "" if worst < EXACT_ENOUGH else f"the mask or padding changes real tokens by {worst:.1e}"


def check_early_exit(backbone: LoadedBackbone, ids: Tensor, seen: list[Seen]) -> str:
    """Ending the forward at a layer leaves the layers up to it as they are, to the bit, and does no harm."""
    for last in {0, len(seen) // 2}:
        kept: list[Seen] = []

        def stop(event: Seen, kept: list[Seen] = kept, last: int = last) -> None:
            if event.module in backbone.layer_of:
                kept.append(event)
            if len(kept) == last + 1:
                raise StopForward

        with tap(stop):
            forward(backbone.module, ids)
        for early, full in zip(kept, seen, strict=False):
            same = early.module is full.module and all(
                torch.equal(getattr(early, k), getattr(full, k)) for k in ("q", "k", "v")
            )
            if not same:
                return f"stopping after event {last} changes {type(full.module).__name__}"
    again, _ = watch(backbone, ids)
    unharmed = all(torch.equal(a.q, b.q) for a, b in zip(seen, again, strict=True))
    return "" if unharmed else "a forward after an early exit differs"


def one_line(error: BaseException) -> str:
    """An error's beginning, which is the same on every machine."""
    text = " ".join(str(error).split()).replace(f"{Path(transformers.__file__).parents[1]}/", "")
    return f"{type(error).__name__}: {text[:240]}"
