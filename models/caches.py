"""The cache that a model writes with: transformers' own, as it is asked for; and how one that quantises is proven.

What a cache does to numbers by quantising them is no matter of a proof: the vectors of a step follow from rounded keys
and values, and are no longer those of one forward. All else is: which columns are whose, positions, padding, chunks. So
for the length of a proof a quantised cache keeps what it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, cache_utils

from sniffer.types import Caching

if TYPE_CHECKING:
    from .language_model import LoadedLanguageModel

CLASSES = {"dynamic": "DynamicCache", "static": "StaticCache", "quantized": "QuantizedCache"}
"""What transformers makes of each name."""

OWN = ("_cache", "_previous_max_cache_length")
"""What a model keeps of static caches, so that lengths of a later one depend on earlier ones."""

NAMES = ("cache", "past_key_values", "cache_params")
"""What a forward calls its cache, the one that it takes and the one that it returns, in one release or another."""


def options_of(caching: Caching) -> dict[str, Any]:
    """What a generation config says of it; nothing where transformers has it as it likes."""
    found: dict[str, Any] = {}
    if caching.cache is not None:
        # A static cache would have steps compiled on some devices, and a compiled forward shows nothing.
        found |= {"cache_implementation": caching.cache, "disable_compile": True}
    if caching.backend is not None:
        found["cache_config"] = {"backend": caching.backend}
    if caching.chunk is not None:
        found |= {"prefill_chunk_size": caching.chunk, "disable_compile": True}
    return found


def forget(model: PreTrainedModel) -> None:
    """What a text comes to must not depend on how long earlier ones were."""
    for name in OWN:
        vars(model).pop(name, None)


@contextmanager
def seen_in(model: PreTrainedModel, caching: Caching) -> Iterator[list[str]]:
    """Looks at the cache that forwards get; what is yielded has, in the end, why it is none that was asked for."""
    why: list[str] = []
    wanted = CLASSES.get(caching.cache or "")

    def look(_: Any, __: Any, said: dict[str, Any]) -> None:
        given = next((type(said[name]).__name__ for name in NAMES if said.get(name) is not None), "another cache")
        if wanted is not None and given != wanted and not why:
            why.append(f"generate.cache={caching.cache}: {type(model).__name__} is given {given} all the same")

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield why
    finally:
        handle.remove()


@contextmanager
def in_a_proof(model: LoadedLanguageModel, tokens: int) -> Iterator[None]:
    """The model's cache for the length of a proof, with prompts of so many tokens.

    Chunks are small enough for several of them to be in a prompt, and a quantised cache keeps numbers as they are.
    """
    asked = model.caching
    if asked.chunk is not None:
        model.caching = replace(asked, chunk=max(1, min(asked.chunk, tokens // 3)))
    with ExitStack() as stack:
        if asked.cache == "quantized":
            stack.enter_context(_nothing_quantised())
        try:
            yield
        finally:
            model.caching = asked


@contextmanager
def _nothing_quantised() -> Iterator[None]:
    layers: list[Any] = [
        getattr(cache_utils, name, None) for name in dir(cache_utils) if name.endswith("QuantizedLayer")
    ]
    by_groups: Any = getattr(cache_utils, "QuantizedLayer", ())
    before = []
    for layer in layers:
        if "_quantize" not in vars(layer) or "_dequantize" not in vars(layer):
            continue
        before.append((layer, layer._quantize, layer._dequantize))
        quantize, dequantize = (_as_it_is, _as_it_is) if issubclass(layer, by_groups) else (_beside_scale, _first)
        layer._quantize, layer._dequantize = quantize, dequantize
    try:
        yield
    finally:
        for layer, quantize, dequantize in before:
            layer._quantize, layer._dequantize = quantize, dequantize


def _as_it_is(_: Any, states: Any, *__: Any, **___: Any) -> Any:
    return states


def _beside_scale(_: Any, states: Any, scale: Any = None) -> Any:
    return states, scale


def _first(_: Any, states: Any) -> Any:
    return states[0]
