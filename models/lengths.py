"""Which lengths a model treats alike: a document's vectors must not depend on what else is in its batch, or was before.

A forward is as long as the longest document in it. Most rotary embeddings turn position p by the same angles in any
forward; but some take other frequencies in one that is longer than the model was trained on (longrope), or yet others
for every length beyond that (dynamic scaling). Which do so is not read off a name. The modules that are given positions
in the probe are called once more, on the CPU, with a few positions that say how long the forward is, over all
lengths that matter. Where the answer for the same position changes, another class of lengths begins (`LengthClasses`);
a module that answers otherwise after a longer forward has to be put back before each one, and is refused where that
does not help. Where nothing can be shown, each length is a class of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sniffer.errors import UnsupportedModelError
from sniffer.types import LengthClasses

from .config_keys import leaves, value_of
from .state import ModuleState, simple_parts

SHORTEST, LONGEST = 16, 1 << 24
"""Lengths between which classes are looked for."""

MOST_BREAKS = 8
"""A module with more classes than that treats each length as its own."""

UNKNOWN = LengthClasses(apart_from=1)

Answer = list[Tensor]


@dataclass(frozen=True)
class PositionCall:
    """How a module was given the positions of a forward: `key` is their place in `args`, or name in `kwargs`."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    key: int | str

    @property
    def positions(self) -> Tensor:
        found: Tensor = self.args[self.key] if isinstance(self.key, int) else self.kwargs[self.key]
        return found


@contextmanager
def watched(backbone: nn.Module) -> Iterator[list[PositionCall]]:
    """Notes which simple parts are given positions, while open."""
    calls: list[PositionCall] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.extend(PositionCall(module, args, dict(kwargs), n) for n, v in enumerate(args) if _are_positions(v))
        calls.extend(PositionCall(module, args, dict(kwargs), n) for n, v in kwargs.items() if _are_positions(v))

    handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in simple_parts(backbone)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def study(backbone: PreTrainedModel, calls: Sequence[PositionCall]) -> tuple[LengthClasses, list[nn.Module]]:
    """What must be kept apart in batches, and the modules that have to be put back before each forward.

    Raises:
        UnsupportedModelError: a module goes on changing although it is put back.
    """
    if not calls and _may_scale(backbone):
        return UNKNOWN, [part for part in backbone.modules() if not type(part).__module__.startswith("torch.nn")]
    points, found, changing = _points(backbone.config.to_dict()), [], []
    for alike in _grouped(calls):
        stand_in = StandIn(alike[0])
        classes = stand_in.classes(points)
        found.append(classes)
        if classes == UNKNOWN or not stand_in.forgets(_tour(classes)):
            changing += [part for call in alike for part in call.module.modules()]
            if classes != UNKNOWN and not stand_in.forgets(_tour(classes), put_back=True):
                raise UnsupportedModelError(
                    f"{type(alike[0].module).__name__} keeps something from one forward to the next that cannot be"
                    " taken back: vectors would depend on the documents before"
                )
    return _together(found), list(dict.fromkeys(changing))


class StandIn:
    """The code and buffers of a module that is given positions, on the CPU: asked at will, it changes nothing."""

    def __init__(self, call: PositionCall) -> None:
        self._call = call
        self._width = call.positions.shape[-1]
        self._known = [0, *(4**n for n in range(self._width - 2))]
        self._answers: dict[int, Answer | None] = {}

    def classes(self, points: Sequence[int]) -> LengthClasses:
        """Where, between the first and the last of `points`, the answers change."""
        possible = [point for point in points if self._fresh(point) is not None]
        if SHORTEST not in possible:
            return UNKNOWN
        breaks: list[int] = []
        known = SHORTEST
        for point in possible:
            while not self._same(known, point):
                known = self._first_other(known, point)
                if not self._same(known, known + 1):
                    return LengthClasses(tuple(breaks), apart_from=known)
                if len(breaks) == MOST_BREAKS:
                    return LengthClasses(apart_from=breaks[0])
                breaks.append(known)
            known = point
        return LengthClasses(tuple(breaks))

    def forgets(self, tour: Sequence[int], *, put_back: bool = False) -> bool:
        """Whether forwards of these lengths, one after the other, each answer as if they were the first.

        Args:
            put_back: whether the module is put back as it was before each of them.
        """
        module = _copied(self._call.module)
        states = [ModuleState(part) for part in module.modules()]
        for length in tour:
            if put_back:
                for state in states:
                    state.restore()
            fresh = self._fresh(length)
            if fresh is not None and not _equal(self._ask(module, length), fresh):
                return False
        return True

    def _same(self, shorter: int, longer: int) -> bool:
        """Whether positions that both lengths have are treated alike in both, as far as they can be asked for."""
        rows = [row for row, position in enumerate(self._known) if position < shorter]
        one, other = self._fresh(shorter), self._fresh(longer)
        return one is None or other is None or _equal(self._rows(one, rows), self._rows(other, rows))

    def _first_other(self, known: int, other: int) -> int:
        """The first length after `known` that is treated otherwise; `other` is."""
        while other - known > 1:
            middle = (known + other) // 2
            known, other = (middle, other) if self._same(known, middle) else (known, middle)
        return other

    def _fresh(self, length: int) -> Answer | None:
        """The answer if the first forward is of that length; None where the module cannot do that."""
        if length not in self._answers:
            try:
                self._answers[length] = self._ask(_copied(self._call.module), length)
            except Exception:  # of upstream code: any; of tables that are shorter than that
                self._answers[length] = None
        return self._answers[length]

    @torch.inference_mode()
    def _ask(self, module: nn.Module, length: int) -> Answer:
        """What `module` answers in a forward of that length, for the positions of `_known` that it has."""
        row = torch.tensor([min(position, length - 1) for position in (*self._known, length - 1)])
        positions = self._call.positions
        asked = row.to(positions.dtype).expand(positions.shape)
        args = [asked if key == self._call.key else _on_cpu(value) for key, value in enumerate(self._call.args)]
        kwargs = {key: asked if key == self._call.key else _on_cpu(v) for key, v in self._call.kwargs.items()}
        # The class's own forward: what others put in its place on the instance is bound to the original.
        forward: Any = type(module).forward
        return [tensor.clone() for tensor in _tensors(forward(module, *args, **kwargs))]

    def _rows(self, answer: Answer, rows: list[int]) -> Answer:
        """The given positions' part of each tensor of an answer; all of one that has no axis for positions."""
        index = torch.tensor(rows, dtype=torch.long)
        return [
            one.index_select(list(one.shape).index(self._width), index) if self._width in one.shape else one
            for one in answer
        ]


def _are_positions(value: Any) -> bool:
    """Whether a tensor counts the tokens of the probe from 0."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() == 0 or value.shape[-1] < 3:
        return False
    return bool((value == torch.arange(value.shape[-1], device=value.device)).all())


def _may_scale(backbone: PreTrainedModel) -> bool:
    """Whether angles may depend on the length in a way that cannot be seen from outside."""
    config = backbone.config
    rope = [value_of(config, "rope_parameters"), value_of(config, "rope_scaling")]
    kinds = {value for one in rope for path, value in leaves(one) if path and path[-1] in ("rope_type", "type")}
    return type(backbone).__module__.startswith("transformers_modules.") or not kinds <= {None, "default"}


def _points(config: Any) -> list[int]:
    """Lengths to compare: powers of two, and every number of the config with the one after it."""
    powers = [1 << n for n in range(LONGEST.bit_length())]
    numbers = [value for _, value in leaves(config) if isinstance(value, int)]
    points = {*powers, *numbers, *(number + 1 for number in numbers)}
    return sorted(point for point in points if SHORTEST <= point <= LONGEST)


def _tour(classes: LengthClasses) -> list[int]:
    """Lengths of all classes, up and down again."""
    up = [SHORTEST, *classes.breaks]
    if classes.apart_from is not None:
        up += [classes.apart_from, classes.apart_from + 7, 2 * classes.apart_from + SHORTEST]
    return [*up, *reversed(up)]


def _together(found: Sequence[LengthClasses]) -> LengthClasses:
    """What several modules want apart."""
    apart_from = min((one.apart_from for one in found if one.apart_from is not None), default=None)
    breaks = sorted({length for one in found for length in one.breaks})
    return LengthClasses(tuple(length for length in breaks if length < (apart_from or LONGEST)), apart_from)


def _grouped(calls: Sequence[PositionCall]) -> list[list[PositionCall]]:
    """Calls of modules that are alike together: in some families each layer has one, and all are the same."""
    groups: dict[Any, list[PositionCall]] = {}
    for call in calls:
        groups.setdefault(_identity(call), []).append(call)
    return list(groups.values())


def _identity(call: PositionCall) -> Any:
    """What tells modules apart that may answer otherwise."""
    plain = [(name, value) for name, value in sorted(vars(call.module).items()) if not name.startswith("_")]
    given = [*call.args, *call.kwargs.values()]
    held = [*(value for _, value in plain), *call.module._buffers.values(), *call.module._parameters.values()]
    tensors = [value for value in held if isinstance(value, Tensor)]
    if any(tensor.device.type == "meta" for tensor in tensors):
        return id(call.module)
    return (
        type(call.module),
        repr([value for value in given if isinstance(value, (str, int, float))]),
        repr([(name, value) for name, value in plain if isinstance(value, (str, int, float, dict, list))]),
        tuple(id(value) for _, value in plain if isinstance(value, PretrainedConfig)),
        tuple(_on_cpu(tensor).numpy().tobytes() for tensor in tensors),
    )


def _copied(module: nn.Module) -> nn.Module:
    """A module of the same class and buffers, on the CPU, that shares nothing which a forward may change."""
    made: nn.Module = object.__new__(type(module))
    vars(made).update({name: _on_cpu(value) for name, value in vars(module).items()})
    made._parameters = {name: _on_cpu(value) for name, value in module._parameters.items()}
    made._buffers = {name: _on_cpu(value) for name, value in module._buffers.items()}
    made._modules = {name: child and _copied(child) for name, child in module._modules.items()}
    return made


def _on_cpu(value: Any) -> Any:
    """Tensors as new ones, in float32 where they are floating; containers copied; the rest as it is."""
    if isinstance(value, Tensor):
        moved = value.detach().to("cpu", copy=True)
        return moved.float() if moved.is_floating_point() else moved
    return copy(value) if isinstance(value, (dict, list, set)) else value


def _tensors(answer: Any) -> Iterator[Tensor]:
    """All tensors of a nested answer."""
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, (tuple, list, Mapping)):
        for value in answer.values() if isinstance(answer, Mapping) else answer:
            yield from _tensors(value)


def _equal(some: Answer, others: Answer) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
