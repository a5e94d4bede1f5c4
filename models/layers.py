"""Where in a model its attention is: the backbone that holds it, and its layers by number."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sniffer.errors import UnsupportedModelError

from .config_keys import value_of
from .finder import DERIVED_NAME, TAPPED_CLASSES, is_modelling_module, is_tapped


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The deepest part of a model that takes token ids and holds every tapped attention of its decoder.

    Raises:
        UnsupportedModelError: no attention in it is tapped, or its code was imported before the hook.
    """
    check_imports(model)
    decoder = model.get_decoder() or model.base_model
    attention = tapped(decoder)
    if not attention:
        decoder = model.base_model
        attention = tapped(decoder)
    if not attention:
        raise UnsupportedModelError(
            f"no attention of {type(model).__name__} is tapped: {_reasons(model)}; a local copy"
            " models/<family>/modeling_<family>.py with tap lines can serve it"
        )
    holders = [
        part
        for part in decoder.modules()
        if isinstance(part, PreTrainedModel) and accepts(part, "input_ids", only_named=True)
        if attention <= set(part.modules())
    ]
    if not holders:
        raise UnsupportedModelError(f"no part of {type(model).__name__} takes input_ids and holds its attention")
    return holders[-1]


def check_imports(model: nn.Module) -> None:
    """Refuses a model whose modelling code did not come through the import hook.

    Raises:
        UnsupportedModelError: naming those modules and what to do.
    """
    homes = {type(part).__module__ for part in model.modules()}
    early = sorted(name for name in homes if is_modelling_module(name) and not is_tapped(name))
    if early:
        raise UnsupportedModelError(
            f"{', '.join(early)} imported before the tap's import hook: call sniffer.models.finder.install() first"
        )
    remote = sorted(name for name in homes if name.split(".")[0] == "transformers_modules")
    if remote and not any(is_tapped(name) for name in remote):
        raise UnsupportedModelError(
            f"the checkpoint brings its own code ({remote[0]}), whose attention no rule matches: set"
            " model.trust_remote_code=false if transformers has this family"
        )


def number_layers(attention: Mapping[str, nn.Module], backbone: nn.Module) -> dict[nn.Module, int]:
    """Attention modules by their place in the outermost list of layers.

    Where layers hold several attentions, or none lies in a list, they are counted in order instead.
    """
    places = {path: layer_place(path, backbone) for path in attention}
    numbers = [number for number in places.values() if number is not None]
    if len(set(numbers)) == len(attention):
        return {module: places[path] or 0 for path, module in attention.items()}
    return {module: number for number, module in enumerate(attention.values())}


def layer_place(path: str, backbone: nn.Module) -> int | None:
    """The index in the outermost ModuleList on a module's path, None if there is none."""
    owner: nn.Module = backbone
    for part in path.split("."):
        if isinstance(owner, nn.ModuleList):
            return int(part)
        owner = getattr(owner, part)
    return None


def skipped_layers(backbone: nn.Module, attention: set[nn.Module]) -> tuple[str, ...]:
    """Layers that hold none of the given attention modules, of the list that holds most of them."""
    lists = [(name, part) for name, part in backbone.named_modules() if isinstance(part, nn.ModuleList)]
    outer = [(name, part) for name, part in lists if not any(name.startswith(other + ".") for other, _ in lists)]
    holding = [(len(attention & set(part.modules())), name, part) for name, part in outer]
    if not holding:
        return ()
    _, name, layers = max(holding, key=lambda item: item[0])
    return tuple(f"{name}.{i}" for i, layer in enumerate(layers) if not attention & set(layer.modules()))


def check_skipped(backbone: nn.Module, skipped: Sequence[str]) -> None:
    """Refuses to pass over a layer that seems to attend by code that no rule recognises.

    Raises:
        UnsupportedModelError: naming its class, file and line.
    """
    for path in skipped:
        if reasons := _unrecognised(backbone.get_submodule(path)):
            raise UnsupportedModelError(
                f"{path} attends by code that fits no rule: {'; '.join(reasons)}; a local copy"
                " models/<family>/modeling_<family>.py with tap lines can serve it"
            )


def tapped(root: nn.Module) -> set[nn.Module]:
    """The modules under `root` whose class, or a base of it, carries a tap."""
    return {part for part in root.modules() if any(_has_tap(cls) for cls in type(part).__mro__)}


def _has_tap(cls: type) -> bool:
    return cls.__name__ in getattr(sys.modules.get(cls.__module__), TAPPED_CLASSES, ())


def _reasons(model: nn.Module) -> str:
    """Why nothing in a model is tapped."""
    return "; ".join(_unrecognised(model)) or "it has no softmax attention that we recognise"


def _unrecognised(root: nn.Module) -> list[str]:
    """Where the attention-like classes of a module's parts stand that no rule matched: class, file and line."""
    used = {type(part).__name__: type(part).__module__ for part in root.modules()}
    found = []
    for name, home in used.items():
        derived = getattr(sys.modules.get(home), DERIVED_NAME, None)
        for one in derived.untapped if derived is not None else ():
            if one.class_name == name:
                file = getattr(sys.modules[home], "__file__", home)
                found.append(f"{name} in {file} line {one.line}: {one.reason}")
    return found


def accepts(module: nn.Module, name: str, *, only_named: bool = False) -> bool:
    parameters = inspect.signature(module.forward).parameters
    starred = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return name in parameters or (starred and not only_named)


WINDOW_KEYS = {
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "local": "window_size",
}
"""Kinds of layers as configs name them, and the key that says how far such a layer sees."""


CHUNKED = ("chunked_attention",)
"""Kinds whose size is that of chunks side by side, and no look-back."""

INDEXER = re.compile(r"indexer", re.IGNORECASE)
"""In the class names of what chooses the keys that attention is to see."""

CHOOSING = ("keep_window_size",)
"""Attributes of attention that chooses keys without such a part."""


def selects_keys(attention: nn.Module) -> bool:
    """Whether attention sees a selection of keys, made by what they hold."""
    parts = any(INDEXER.search(type(part).__name__) for part in attention.modules())
    return parts or any(hasattr(attention, name) for name in CHOOSING)


def sight_of(module: PreTrainedModel, numbers: Mapping[nn.Module, int]) -> dict[int, dict[str, Any]]:
    """What each layer's queries see of the keys before them, as `selfcheck.geometry_of` takes it."""
    kinds, windows = value_of(module.config, "layer_types") or (), windows_of(module)
    chunked = {layer for layer, kind in enumerate(kinds) if kind in CHUNKED}
    return {
        number: {"window": windows.get(number), "chunked": number in chunked, "selects": selects_keys(attention)}
        for attention, number in numbers.items()
    }


def windows_of(module: PreTrainedModel) -> dict[int, int]:
    """Windows that a layer has by its mask, though its attention call may not name them.

    The config lists the kind of each layer; without such a list, a backbone that makes sliding masks has them in
    every layer.
    """
    config: Any = module.config
    kinds = value_of(config, "layer_types") or value_of(config, "attention_layers")
    if not kinds and "create_sliding_window_causal_mask" in inspect.unwrap(type(module).forward).__code__.co_names:
        kinds = ["sliding_attention"] * config.num_hidden_layers
    sizes = {kind: value_of(config, key) for kind, key in WINDOW_KEYS.items()}
    return {layer: sizes[kind] for layer, kind in enumerate(kinds or []) if isinstance(sizes.get(kind), int)}
