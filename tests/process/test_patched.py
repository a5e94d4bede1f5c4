"""What is patched for a while is afterwards as it was, also after an exception, and however it was there before."""

from __future__ import annotations

import os
import types
from typing import Any

import pytest

from sniffer.process.patched import environment, patched


class Base:
    @staticmethod
    def plain() -> str:
        return "plain"

    @property
    def told(self) -> str:
        return "told"


class Heir(Base):
    pass


def module() -> types.ModuleType:
    made = types.ModuleType("made")
    made.plain = Base.plain  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (Base, "plain", staticmethod(lambda: "other")),
        (Base, "told", property(lambda self: "other")),
        (Heir, "plain", staticmethod(lambda: "other")),
        (Base(), "mine", "other"),
        (module(), "plain", lambda: "other"),
    ],
)
def test_what_is_patched_is_given_back(owner: Any, name: str, value: Any, fails: bool):
    before = dict(vars(owner))
    try:
        with patched(owner, name, value):
            assert vars(owner)[name] is value
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert dict(vars(owner)) == before
    assert Base.plain() == Heir.plain() == "plain" and Base().told == "told"


@pytest.mark.parametrize("before", [None, "x"])
def test_the_environment_is_given_back(before: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("A_VARIABLE", raising=False)
    if before is not None:
        monkeypatch.setenv("A_VARIABLE", before)
    with pytest.raises(KeyboardInterrupt), environment("A_VARIABLE", "y"):
        assert os.environ["A_VARIABLE"] == "y"
        raise KeyboardInterrupt
    assert os.environ.get("A_VARIABLE") == before
