"""`model.compile=true`: the layers of a backbone through torch.compile, each as one graph.

A layer is compiled whole (`fullgraph`), for any length, and layers that are alike share their code. No compiler
follows an observer, and a new one for each batch would have everything compiled anew. So while a layer runs,
one and the same list stands in for the observer; as soon as the layer has run, outside compiled code, what is on
the list is shown to the observer. There too it may end the forward: of the last wanted layer the rest is then
computed, of the layers after it nothing.

The proof of the taps (selfcheck.py) is made before compiling. Afterwards the same probe must show the same
layers the same vectors, up to the rounding of a compiler that adds up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sniffer.errors import ConfigError, first_line
from sniffer.tap import TAP, Seen, tap
from sniffer.types import KINDS

from . import selfcheck
from .loaded import LoadedBackbone

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest difference over the largest value of a kind in a layer, over the few tokens of the probe."""

ADVICE = "leave model.compile out"

BACKEND = "inductor"

VARIANTS = 64
"""Compilations of one piece of code, where layers differ: windows, experts, shared keys, pre kinds wanted or not."""


def compile_layers(backbone: LoadedBackbone) -> None:
    """Compiles the layers that attend, in place.

    Raises:
        ConfigError: a layer cannot be compiled as one graph, or shows other vectors than before.
    """
    embeddings: Any = backbone.module.get_input_embeddings()
    ids = selfcheck.probe_ids(embeddings.num_embeddings, backbone.device)
    # With and without the pre kinds are two graphs.
    probes = (False,) if backbone.pre_missing else (False, True)
    before = [_shown(backbone, ids, pre) for pre in probes]
    for layer in attending_layers(backbone):
        layer.forward = _compiled(layer.forward)
    try:
        after = [_shown(backbone, ids, pre) for pre in probes]
    except Exception as error:  # of the compiler: any
        raise ConfigError(f"model.compile=true fails for this model: {first_line(error)}; {ADVICE}") from error
    for plain, compiled in zip(before, after, strict=True):
        check_alike(plain, compiled)


def attending_layers(backbone: LoadedBackbone) -> list[nn.Module]:
    """The members of lists of layers that hold attention, outermost ones only."""
    attention = set(backbone.layer_of)
    found: list[nn.Module] = []
    for part in backbone.module.modules():
        if isinstance(part, nn.ModuleList):
            layers = [layer for layer in part if attention & set(layer.modules())]
            inside = {inner for layer in found for inner in layer.modules()}
            found += [layer for layer in layers if layer not in inside]
    return found


def check_alike(before: Sequence[Seen], after: Sequence[Seen]) -> None:
    """Refuses compiled layers that show something else than they did.

    Raises:
        ConfigError: other layers, another order, or other vectors.
    """
    if [event.module for event in before] != [event.module for event in after]:
        raise ConfigError(f"model.compile=true: compiled layers do not show what they show otherwise; {ADVICE}")
    for one, other in zip(before, after, strict=True):
        for kind in KINDS:
            plain, compiled = getattr(one, kind), getattr(other, kind)
            if plain is None:
                continue
            difference = (plain.float() - compiled.float()).abs().max() / plain.float().abs().max()
            if not difference <= TOLERANCE[plain.dtype]:
                raise ConfigError(
                    f"model.compile=true: compiled, {type(one.module).__name__} shows a {kind} that differs by"
                    f" {float(difference):.1g} of its largest value; {ADVICE}"
                )


class _Held:
    """What compiled code shows, until its layer has run."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def __call__(self, seen: Seen) -> None:
        self.seen.append(seen)


HELD = _Held()


@contextmanager
def _held_back() -> Iterator[None]:
    """Shows the open tap's observer afterwards what it would have been shown inside; nothing after an error."""
    observer = TAP.observer
    if observer is None:
        yield
        return
    TAP.observer = HELD
    try:
        yield
        shown = tuple(HELD.seen)
    finally:
        TAP.observer = observer
        HELD.seen.clear()
    for seen in shown:
        observer(seen)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, backend=BACKEND, fullgraph=True, dynamic=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        with _held_back(), torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return compiled(*args, **kwargs)

    return run


@torch.inference_mode()
def _shown(backbone: LoadedBackbone, ids: torch.Tensor, pre: bool) -> list[Seen]:
    seen: list[Seen] = []
    with tap(seen.append, pre=pre):
        backbone(ids)
    return seen
