"""Proof at start-up that what is tapped is what attention receives.

A short probe goes through the whole backbone while all that attends is watched (attending.py), so that each
attention is seen twice: by our tap and, independently, from outside. The q, k and v of both must be the same
objects with the same values, once per attention layer, and nothing may attend that shows nothing. Further probes show
that the backbone is causal (causality.py), and one has another length, since code may do otherwise with longer texts.
The wrappers are taken away again, whatever happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sniffer.errors import SnifferError, UnsupportedModelError, first_line, of_a_device
from sniffer.tap import Seen, as_written, tap
from sniffer.types import KIND, KINDS, LayerGeometry

from .attending import Attended, Received, Witness
from .witness import witnessed

PROBE_BATCH, PROBE_SEQ = 2, 11
OTHER_SEQS = (19, 7)
"""Of the probe of another length: the longer one where the model has room for it."""

Forward = Callable[[Int[Tensor, "batch seq"]], Any]
Modules = Mapping[nn.Module, str]
"""The parts of a backbone and their paths in it."""


@dataclass(frozen=True)
class Probe:
    """What one forward has shown.

    Attributes:
        ids: the tokens, (batch, seq).
        seen: the events of the taps, but those of attention within tokens.
        received: what attention functions were given, likewise.
        alone: computations of attention during which no module ran that has shown anything.
        witness: all that was seen from outside.
        output: of the forward.
    """

    ids: Int[Tensor, "batch seq"]
    seen: list[Seen]
    received: list[Received]
    alone: list[Attended]
    witness: Witness
    output: Any


def probe_ids(
    vocabulary: int, device: torch.device, seq: int = PROBE_SEQ, rows: int = PROBE_BATCH
) -> Int[Tensor, "batch seq"]:
    """A few different tokens, away from the special ones that most vocabularies begin with."""
    first = min(16, vocabulary // 2)
    ids = torch.arange(rows * seq, device=device) * 7 % max(1, vocabulary - first) + first
    return ids.view(rows, seq)


def observe_probe(forward: Forward, ids: Int[Tensor, "batch seq"], modules: Modules, *, pre: bool) -> Probe:
    """One tapped and witnessed forward.

    Raises:
        UnsupportedModelError: the forward fails on token ids alone.
    """
    witness = Witness(modules.keys())
    with torch.inference_mode(), witnessed(witness), tap(witness.show, pre=pre), as_written(), witness:
        try:
            output = forward(ids)
        except SnifferError:
            raise
        except Exception as error:  # of upstream code: any
            if of_a_device(error):
                raise
            raise UnsupportedModelError(
                f"it cannot run on token ids alone: {type(error).__name__}: {first_line(error)}"
            ) from error
    within = {event.module for event in witness.seen if attends_within_tokens(event, tuple(ids.shape))}
    showing = {event.module for event in witness.seen}
    return Probe(
        ids=ids,
        seen=[event for event in witness.seen if event.module not in within],
        received=[call for call in witness.calls if call.module not in within],
        alone=[one for one in witness.attended if not showing & set(one.running)],
        witness=witness,
        output=output,
    )


def attends_within_tokens(event: Seen, shape: tuple[int, ...] = (PROBE_BATCH, PROBE_SEQ)) -> bool:
    """Whether each token attends to things of its own, such as earlier layers' states: no layer of attention.

    Its sequence is then a batch axis: (batch, seq, queries, dim) with keys alike. `shape` is that of the token ids.
    """
    shapes = [tuple(states.shape) for states in (event.q, event.k)]
    return all(len(s) == 4 and s[:2] == shape and s[2] != shape[1] for s in shapes)


def check_taps(probe: Probe, names: Modules) -> None:
    """Refuses a model whose taps and attention calls disagree.

    Raises:
        UnsupportedModelError: no tap fired, one fired more than once, tensors are not (batch, heads,
            seq, dim), attention ran untapped, or it received other tensors or numbers than were shown.
    """
    if not probe.seen:
        raise UnsupportedModelError("no attention of this model is tapped: its modelling code fits no rule")
    for module, count in Counter(event.module for event in probe.seen).items():
        if count > 1:
            raise UnsupportedModelError(
                f"{named(module, names)} attends {count} times in one forward: looped models are not supported"
            )
    for event in probe.seen:
        _check_layout(event, names, tuple(probe.ids.shape))
    calls: dict[nn.Module, list[Received]] = {}
    for call in probe.received:
        if call.module in names:
            calls.setdefault(call.module, []).append(call)
    by_module = {event.module: event for event in probe.seen}
    for module, own in calls.items():
        if module not in by_module:
            raise UnsupportedModelError(f"{named(module, names)} attends without a tap: its code fits no rule")
        if not any(_same(by_module[module], call) for call in own):
            raise UnsupportedModelError(f"{named(module, names)} attends with other tensors than its tap shows")
    _check_values(probe.witness, by_module, names)
    for event in probe.seen:
        _check_numbers(event, calls.get(event.module, []), probe.witness.scales.get(event.module), names)


def _check_values(witness: Witness, shown: Mapping[nn.Module, Seen], names: Modules) -> None:
    """Attention receives what the tap has shown, and it has not been altered in between."""
    for event, kind in witness.changed:
        if event.module in shown:
            raise UnsupportedModelError(
                f"{named(event.module, names)} changes {kind} in place between its tap and attention:"
                " let its tap come last"
            )
    for event, kind in witness.unused:
        if event.module in shown:
            raise UnsupportedModelError(
                f"{named(event.module, names)} attends with other tensors than its tap shows: "
                f"its {kind} enters no attention"
            )


def _check_numbers(event: Seen, calls: list[Received], scale: Any, names: Modules) -> None:
    """The numbers that a tap shows beside its tensors are those that attention was given."""
    given = next((call for call in calls if _same(event, call)), None)
    for name in ("scaling", "sliding_window"):
        said = _number(getattr(event, name))
        true = _number(getattr(given, name)) if given is not None else _number(scale) if name == "scaling" else None
        if said != true:
            raise UnsupportedModelError(
                f"{named(event.module, names)} shows {name}={said}, but its attention is given {true}: correct its tap"
            )


def geometry_of(
    event: Seen, layer: int, module: str, window: int | None, *, chunked: bool = False, selects: bool = False
) -> LayerGeometry:
    """Shapes and facts of a layer, from its event; kinds that were not shown are absent."""
    shown = {kind: getattr(event, kind) for kind in KINDS if getattr(event, kind) is not None}
    return LayerGeometry(
        layer=layer,
        module=module,
        heads={kind: states.shape[1] for kind, states in shown.items()},
        dims={kind: states.shape[-1] for kind, states in shown.items()},
        scaling=_number(event.scaling),
        sliding_window=window if event.sliding_window is None else int(event.sliding_window),
        chunked=chunked,
        selects=selects,
    )


def shared_keys(seen: list[Seen], numbers: Mapping[nn.Module, int]) -> dict[int, int]:
    """Layers that attend with the keys of an earlier layer: its number by theirs."""
    owner: dict[tuple[int, torch.Size], int] = {}
    found = {}
    for event in seen:
        first = owner.setdefault((event.k.data_ptr(), event.k.shape), numbers[event.module])
        if first != numbers[event.module]:
            found[numbers[event.module]] = first
    return found


def _check_layout(event: Seen, names: Modules, shape: tuple[int, ...]) -> None:
    for kind in KINDS:
        states = getattr(event, kind)
        if states is None:
            continue
        if states.dim() != 4 or (states.shape[0], states.shape[2]) != shape:
            raise UnsupportedModelError(
                f"{named(event.module, names)} shows {kind} as {tuple(states.shape)};"
                f" expected ({shape[0]}, heads, {shape[1]}, dim): one vector per token"
            )
        if KIND[kind].pre and states.shape != getattr(event, KIND[kind].draw).shape:
            raise UnsupportedModelError(f"{named(event.module, names)} shows {kind} in another shape than its kind")


def _same(event: Seen, call: Received) -> bool:
    return event.q is call.q and event.k is call.k and event.v is call.v


def named(module: nn.Module | None, names: Modules) -> str:
    return f"{names.get(module, 'a module') or 'the backbone'} ({type(module).__name__})" if module else "the backbone"


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None
