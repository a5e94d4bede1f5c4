"""What Hydra's parser does not read is told as it was typed, with a way to type it that is read."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from sniffer.config.quoting import as_text, refuse_unreadable
from sniffer.errors import ConfigError


def told(*words: str, sweep: bool = False) -> str:
    with pytest.raises(ConfigError) as error:
        refuse_unreadable(words, sweep=sweep)
    return str(error.value)


@pytest.mark.parametrize(
    ("word", "way"),
    [
        ("dataset.path=a=b", "\"dataset.path='a=b'\""),
        ("dataset.where=n > 3", "\"dataset.where='n > 3'\""),
        ("dataset.path=a(1).txt", "\"dataset.path='a(1).txt'\""),
        ("dataset.path=[a].txt", "\"dataset.path='[a].txt'\""),
        ("dataset.path=~/x", "\"dataset.path='~/x'\""),
        ("dataset.path=caf\u00e9.txt", "\"dataset.path='caf\u00e9.txt'\""),
        ("dataset.chat.template={% x %}", "\"dataset.chat.template='{% x %}'\""),
        ("dataset.path=it's", "'dataset.path=\"it'\"'\"'s\"'"),
    ],
)
def test_plain_text_goes_into_quotes(word: str, way: str) -> None:
    said = told("seed=1", word)
    assert said.startswith(f"{word} cannot be read") and said.endswith(way)
    # What the shell makes of it, and Hydra of that, is what was meant.
    typed = subprocess.run(["sh", "-c", f"printf %s {way}"], capture_output=True, check=True).stdout
    assert OverridesParser.create().parse_override(typed.decode()).value() == word.partition("=")[2]


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("foo", ["'foo' is no KEY=VALUE", "sampler.base_rate=2"]),
        ("capture.layers=[0,1", ["has no end", "close it with ]", "'capture.layers=[0,1]'"]),
        ("model.config_overrides={a: 1", ["close it with }", "'model.config_overrides={a: 1}'"]),
        ("dataset.path=a,b", ["several values", "'dataset.path=[a,b]'", "\"dataset.path='a,b'\"", "add -m"]),
    ],
)
def test_others_are_told_what_they_lack(word: str, parts: list[str]) -> None:
    said = told(word)
    assert all(part in said for part in parts), said
    assert "\n" not in said


def test_what_hydra_reads_is_let_through() -> None:
    words = ["a=1", "b=[1,2]", "c='x=y'", "~sampler", "+d={e: f}", "++g=null", "model=llama3", "h=a b"]
    refuse_unreadable(words, sweep=False)
    refuse_unreadable(["a=1,2", "b=range(4)"], sweep=True)
    refuse_unreadable(["a=1,2", "hydra.mode=MULTIRUN"], sweep=False)


@given(value=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12))
@settings(max_examples=150, deadline=None)
def test_a_way_that_is_told_leads_there(value: str) -> None:
    way = as_text("key", value)
    if way is not None:
        (word,) = shlex.split(way)
        assert OverridesParser.create().parse_override(word).value() == value
