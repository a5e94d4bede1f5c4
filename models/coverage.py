"""Nothing attends that shows nothing: no part of the model, in no text of another length, and none that comes later."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from sniffer.errors import UnsupportedModelError

from .selfcheck import Modules, Probe, named


def check_silent(called: Iterable[nn.Module], probe: Probe, names: Modules) -> None:
    """Refuses a model with a module whose class has a tap, and which was called, and has shown nothing.

    Raises:
        UnsupportedModelError: naming it.
    """
    showing = {event.module for event in probe.witness.seen}
    for module in called:
        if module not in showing:
            raise UnsupportedModelError(
                f"{named(module, names)} is called and shows nothing: its forward is replaced, or ends before its tap"
            )


def check_lengths(first: Probe, other: Probe, names: Modules) -> None:
    """Refuses a model whose taps show something in a text of one length only.

    Raises:
        UnsupportedModelError: naming a module and the length.
    """
    shown = [{event.module for event in probe.seen} for probe in (first, other)]
    for module in (one for one in names if one in shown[0] ^ shown[1]):
        lengths = [probe.ids.shape[1] for probe in (first, other)]
        there, silent = lengths if module in shown[0] else reversed(lengths)
        raise UnsupportedModelError(
            f"{named(module, names)} shows its vectors in a text of {there} tokens, and none in one of {silent}"
        )


def check_alone(first: Probe, other: Probe, names: Modules) -> None:
    """Refuses a model of which some part attends over the tokens and shows nothing.

    Attention over something else, such as experts or a token's own states, is over as many keys in a longer text.

    Raises:
        UnsupportedModelError: naming the module and what it attends by.
    """
    before, after = _keys_of(first), _keys_of(other)
    for module, what in {**before, **after}:
        if before.get((module, what)) != after.get((module, what)):
            raise UnsupportedModelError(
                f"{named(module, names)} attends by {what} without a tap: its code fits no rule, or has been replaced"
            )


def _keys_of(probe: Probe) -> dict[tuple[nn.Module | None, str], list[tuple[int, ...]]]:
    found: dict[tuple[nn.Module | None, str], list[tuple[int, ...]]] = {}
    for one in probe.alone:
        found.setdefault((next(iter(one.running), None), one.what), []).append(one.keys)
    return found


def check_parts(backbone: nn.Module, names: Modules) -> None:
    """Refuses a model that puts other parts in the place of its own while it runs.

    Raises:
        UnsupportedModelError: naming one: what was proven of it would not hold, and the texts before would have a say.
    """
    before = {name: part for part, name in names.items()}
    for name, part in backbone.named_modules():
        if before.get(name) is not part:
            was = type(before[name]).__name__ if name in before else "nothing"
            raise UnsupportedModelError(
                f"a forward puts {type(part).__name__} in the place of {was} at {name}: short texts change how long "
                "ones are computed; choose one of the two in model.config_overrides"
            )
