"""A mistyped key is told with the one that was meant; nothing is suggested that does not exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sniffer.config.meant import keys, with_meant
from sniffer.config.resolve import conf_folder
from sniffer.words import NO_KEY

CONF = conf_folder()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("capture.layrs", "capture.layers"),
        ("layers", "capture.layers"),
        ("smapler.base_rate", "sampler.base_rate"),
        ("dataset.text_colum", "dataset.text_column"),
        ("output.memory_limt", "output.memory_limit"),
        ("model.checkpont", "model.checkpoint"),
        ("sampler.q.base_rat", "sampler.q.base_rate"),
    ],
)
def test_the_nearest_key_is_named(typed: str, meant: str):
    said = with_meant(NO_KEY.format(typed), CONF)
    assert (
        said == f"there is no key {typed}, did you mean {meant}? `python -m sniffer --cfg job` shows those that exist"
    )


@pytest.mark.parametrize("said", [NO_KEY.format("zebra"), NO_KEY.format("x.y.z"), "dataset.path=x: no such file"])
def test_where_nothing_is_near_nothing_is_added(said: str):
    assert with_meant(said, CONF) == said


def test_every_suggestion_is_a_key_that_can_be_set():
    known = {*keys(CONF)}
    assert {"seed", "capture.kinds", "sampler.base_rate", "dataset.path", "output.checkpoint_every"} <= known
    odd = ("_target_", "/", "hidden_size")
    assert not [key for key in known if key.startswith(("hydra", "defaults")) or any(word in key for word in odd)]


@pytest.mark.parametrize(("text", "typed"), [("capture:\n  layrs: [1]\n", "capture.layrs"), ("sed: 1\n", "sed")])
def test_so_it_is_for_a_file_of_ones_own(tmp_path: Path, text: str, typed: str):
    (tmp_path / "mine.yaml").write_text(f"defaults:\n  - config\n  - _self_\n{text}")
    command = [sys.executable, "-m", "sniffer", "-cd", str(tmp_path), "-cn", "mine"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1
    assert f"mine.yaml: there is no key {typed}, did you mean" in ended.stderr
