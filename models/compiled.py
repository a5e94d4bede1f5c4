"""`model.compile=true`: the layers of a backbone through torch.compile, each as one graph.

A layer is compiled whole (`fullgraph`), for any length, and layers that are alike share their code. No compiler
follows an observer, and a new one for each batch would have everything compiled anew. So while a layer runs,
one and the same list stands in for the observer; as soon as the layer has run, outside compiled code, what is on
the list is shown to the observer. There too it may end the forward: of the last wanted layer the rest is then
computed, of the layers after it nothing.

The proof of the taps (selfcheck.py) is made before compiling. Afterwards the same probe must show the same
layers the same vectors, up to the rounding of a compiler that adds up in another order. Each layer is given what it was
given before, so that the rounding of eighty layers does not add up to what no tolerance could tell from a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sniffer.errors import ConfigError, first_line, of_a_device
from sniffer.tap import TAP, Seen, tap
from sniffer.types import KINDS

from . import selfcheck
from .differences import apart
from .loaded import LoadedBackbone
from .unrotated import Inputs, given

Outputs = dict[nn.Module, Tensor]
"""What layers have handed on."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest difference over the largest value of a kind in a layer, or of its output, over the few tokens of the probe.
It is that of one layer, whatever the depth; in 16 bits some units in the last place."""

FLIPPED = 1 / 8
"""Of the tokens of a layer's output, those that may differ by more: a choice between experts that rounding decides."""

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
    layers = attending_layers(backbone)
    before = [_shown(backbone, ids, pre, layers) for pre in probes]
    for layer in layers:
        layer.forward = _compiled(layer.forward)
    try:
        after = [_shown(backbone, ids, pre, layers, one.inputs) for pre, one in zip(probes, before, strict=True)]
    except Exception as error:  # of the compiler: any
        if of_a_device(error):
            raise
        raise ConfigError(f"model.compile=true fails for this model: {first_line(error)}; {ADVICE}") from error
    for plain, compiled in zip(before, after, strict=True):
        check_alike(plain.seen, compiled.seen)
        check_outputs(plain.outputs, compiled.outputs)


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
            difference = float(apart(plain, compiled).max())
            if difference > _tolerance(plain):
                raise ConfigError(
                    f"model.compile=true: compiled, {type(one.module).__name__} shows a {kind} that differs by"
                    f" {difference:.1g} of its largest value; {ADVICE}"
                )


def check_outputs(before: Outputs, after: Outputs) -> None:
    """Refuses compiled layers that hand on something else than they did, given the same.

    Raises:
        ConfigError: more than a few tokens of an output are another.
    """
    for layer, plain in before.items():
        moved = apart(plain, after[layer]).flatten(0, -2).amax(-1)
        if (moved > _tolerance(plain)).float().mean() > FLIPPED:
            raise ConfigError(
                f"model.compile=true: compiled, {type(layer).__name__} gives an output that differs by"
                f" {float(moved.median()):.1g} of its largest value; {ADVICE}"
            )


def _tolerance(states: Tensor) -> float:
    return TOLERANCE.get(states.dtype, TOLERANCE[torch.float32])


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


@dataclass
class _Shown:
    """One forward: what its layers have shown, and what each was given and has handed on."""

    seen: list[Seen] = field(default_factory=list)
    inputs: Inputs = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)


@torch.inference_mode()
def _shown(
    backbone: LoadedBackbone, ids: Tensor, pre: bool, layers: Sequence[nn.Module], inputs: Inputs | None = None
) -> _Shown:
    """Args: inputs: what the layers are to be given, in place of what comes to them."""
    shown = _Shown()

    def keep_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A layer may write to what it is given.
        shown.inputs[layer] = tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}

    def keep_output(layer: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            shown.outputs[layer] = first.clone()

    with ExitStack() as hooks:
        if inputs is not None:
            hooks.enter_context(given(inputs))
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(keep_output).remove)
        hooks.enter_context(tap(shown.seen.append, pre=pre))
        backbone(ids)
    return shown


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
