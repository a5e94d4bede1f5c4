"""A probe leaves no trace: not in modules, not in random numbers, not with those who watch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models.state import LARGE
from sniffer.models.undisturbed import undisturbed
from torch import Tensor, nn

from sniffer.errors import UnsupportedModelError
from sniffer.tap import TAP, tap


class Restless(nn.Module):
    """Everything that a forward may do to its module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("frequencies", torch.ones(3), persistent=False)
        self.longest = 0
        self.seen: list[int] = []
        self.by_name = {"a": 1}
        self.table = torch.zeros(3)

    def forward(self, states: Tensor) -> Tensor:
        self.steps += 1
        self.register_buffer("frequencies", self.frequencies * 2, persistent=False)
        self.register_buffer("another", torch.ones(1))
        self.longest = len(states)
        self.seen.append(len(states))
        self.by_name["b"] = 2
        self.table[0] = 5.0
        self.afterwards = True
        self.train()
        return self.linear(states) + torch.rand(()) + np.random.rand() + random.random()


def state_of(module: nn.Module) -> dict[str, Any]:
    """All attributes and buffers of a model's parts, with the values of tensors and what containers hold."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        for key, value in {**vars(part), **part._buffers}.items():
            plain = value.tolist() if isinstance(value, Tensor) else repr(value)
            found[f"{name}.{key}"] = (id(value), plain)
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_is_as_it_was_and_so_are_the_random_numbers(fails: bool):
    model = nn.Sequential(Restless().eval(), nn.Dropout())
    before = state_of(model)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = (torch.rand(()), np.random.rand(), random.random())
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    try:
        with undisturbed(model), torch.inference_mode():
            model(torch.ones(4, 3))
            assert state_of(model) != before
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert state_of(model) == before
    assert (torch.rand(()), np.random.rand(), random.random()) == expected
    model(torch.ones(4, 3)).sum().backward()


def test_watchers_see_nothing_and_watch_on_in_their_order():
    model = nn.Sequential(nn.Linear(3, 3))
    seen: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: seen.append("first")),
        model[0].register_forward_hook(lambda *_: seen.append("third"), always_call=True),
        model[0].register_forward_pre_hook(lambda *_, **__: seen.append("second"), with_kwargs=True),
    ]
    with undisturbed(model):
        model(torch.ones(1, 3))
        assert not seen
    model(torch.ones(1, 3))
    assert seen == ["first", "second", "third"]
    for handle in handles:
        handle.remove()
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_belongs_to_the_computation_stays():
    """Such as the hook that puts weights together before each call."""
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 3, bias=False)))
    states = torch.ones(1, 3)
    with undisturbed(model), torch.no_grad():
        before = model(states)
        model[0].weight_g.mul_(2.0)
        assert torch.allclose(model(states), 2 * before)


def test_an_open_tap_sees_no_probe():
    seen: list[Any] = []
    with tap(seen.append):
        with undisturbed(nn.Linear(1, 1)):
            assert TAP.observer is None
        assert TAP.observer is not None


def test_a_large_tensor_that_is_written_to_is_refused():
    model = Restless()
    model.table = torch.zeros(LARGE // 4 + 1)
    with pytest.raises(UnsupportedModelError, match="writes to a tensor of .* bytes in Restless"), undisturbed(model):
        model(torch.ones(2, 3))
