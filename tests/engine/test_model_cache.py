"""One model at a time, and never another one's."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from sniffer.engine.model_cache import LastModel


class Weights:
    """Stands for a model in memory; like modules, it refers to itself."""

    alive: weakref.WeakSet[Weights] = weakref.WeakSet()
    made = 0

    def __init__(self) -> None:
        self.circle = self
        Weights.made += 1
        self.number = Weights.made
        Weights.alive.add(self)


@dataclass(frozen=True)
class Wanted:
    """A checkpoint by value, like the real one."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Weights:
        assert not Weights.alive, "another model is still in memory"
        return Weights()

    def describe(self) -> dict[str, Any]:
        return {"files": FILES.get(self.name)}


FILES: dict[str, str] = {}
"""What stands in the files of each checkpoint."""


def test_the_same_value_is_loaded_once():
    last = LastModel()
    first = last.load(Wanted("a", {"x": [1]}))
    assert last.load(Wanted("a", {"x": [1]})) is first
    del first
    last.clear()
    assert not Weights.alive


def test_a_model_with_its_head_is_another():
    last, headed = LastModel(), Wanted("a")
    object.__setattr__(headed, "headed", True)
    numbers = [last.load(one).number for one in (Wanted("a"), headed, headed, Wanted("a"))]  # type: ignore[arg-type]
    assert len(set(numbers)) == 3 and numbers[1] == numbers[2]
    last.clear()


def test_another_value_is_another_model_and_the_only_one():
    last, seen = LastModel(), []
    for wanted in (Wanted("a"), Wanted("b"), Wanted("b", {"x": 1}), Wanted("b", {"x": 2}), Wanted("b")):
        seen.append(id(last.load(wanted)))
        assert len(Weights.alive) == 1
    last.clear()
    assert not Weights.alive


def test_a_model_that_fails_to_load_leaves_none_behind():
    class Broken(Wanted):
        def load(self) -> Weights:
            raise OSError("no such file")

    last = LastModel()
    last.load(Wanted("a"))
    for _ in range(2):
        try:
            last.load(Broken("a"))
        except OSError:
            assert not Weights.alive
    assert isinstance(last.load(Wanted("a")), Weights)
    last.clear()


def test_files_that_have_changed_are_another_model(monkeypatch):
    last = LastModel()
    seen = [last.load(Wanted("a")).number]
    monkeypatch.setitem(FILES, "a", "other weights")
    seen += [last.load(Wanted("a")).number, last.load(Wanted("a")).number]
    assert seen[0] != seen[1] == seen[2]
    last.clear()
