"""The import hook, each time in a fresh interpreter, since what is imported stays imported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from sniffer.models.finder import TappedLoader

ROOT = Path(__file__).resolve().parents[2]
LLAMA = "transformers.models.llama.modeling_llama"


def fresh(code: str, **environment: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_changes_nothing():
    out = fresh("""
        import sys
        before = list(sys.meta_path)
        import sniffer.models, sniffer.models.finder
        print(sys.meta_path == before, "transformers" in sys.modules)
    """)
    assert out == "True False"


def test_install_twice_is_once_and_uninstall_takes_it_away():
    out = fresh("""
        import sys
        from sniffer.models import finder
        before = list(sys.meta_path)
        finder.install(); finder.install()
        print(len(sys.meta_path) - len(before), end=" ")
        finder.uninstall()
        print(sys.meta_path == before, end=" ")
        try:
            with finder.installed():
                assert len(sys.meta_path) == len(before) + 1
                raise KeyError
        except KeyError:
            print(sys.meta_path == before)
    """)
    assert out == "1 True True"


@pytest.mark.long
@pytest.mark.parametrize("early", [False, True])
def test_a_checkpoint_gives_back_what_it_taps(early: bool):
    """The hook when it is loaded; the code of a family that was there before, with its backbone."""
    out = fresh(f"""
        import gc, sys
        {f"import {LLAMA}" if early else ""}
        from sniffer.models.backbone import Checkpoint
        from sniffer.models.finder import is_tapped
        from sniffer.models.retrofit import SWAPPED
        small = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=300)
        checkpoint = Checkpoint("none", weights="random", model_type="llama", config_overrides=small, device="cpu")
        before = list(sys.meta_path)
        checkpoint.limits(), checkpoint.outline()
        assert sys.meta_path == before
        backbone = checkpoint.load()
        module = backbone.module
        print(sys.meta_path == before, is_tapped("{LLAMA}"), len(SWAPPED), end=" ")
        del backbone
        gc.collect()
        print(len(SWAPPED), end=" ")
        del module
        gc.collect()
        print(len(SWAPPED))
    """)
    assert out == ("True True 1 1 0" if early else "True True 0 0 0")


def test_a_family_is_tapped_under_its_own_name_even_after_the_auto_classes():
    out = fresh(f"""
        from transformers import AutoModelForCausalLM, LlamaConfig
        from sniffer.models import finder
        finder.install()
        import {LLAMA} as llama
        import inspect
        print(llama.__name__, llama.__package__, finder.is_tapped(llama.__name__))
        print(inspect.getsourcefile(llama.LlamaAttention) == llama.__file__)
        print("sniffer" in inspect.getsource(llama.LlamaAttention.forward))
    """)
    assert out.splitlines() == [f"{LLAMA} transformers.models.llama True", "True", "False"]


def test_no_bytecode_is_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    source = tmp_path / "modeling_llama.py"
    forward = "    def forward(self, q, k, v):\n        return attention_interface(self, q, k, v)\n"
    source.write_text(f"class Attention:\n{forward}")

    def is_tapped(loader: SourceFileLoader) -> bool:
        return "observe" in str(list(names_in(loader.get_code(LLAMA))))

    assert is_tapped(TappedLoader(LLAMA, str(source)))
    assert not list(tmp_path.rglob("*.pyc"))
    assert not is_tapped(SourceFileLoader(LLAMA, str(source)))
    assert list(tmp_path.rglob("*.pyc"))
    assert is_tapped(TappedLoader(LLAMA, str(source)))


def names_in(code: Any) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_in(inner)


@pytest.mark.long
def test_a_traceback_names_the_upstream_line():
    out = fresh(f"""
        import traceback
        from sniffer.models import finder
        finder.install()
        import {LLAMA} as llama
        from sniffer.tap import tap
        from transformers import LlamaConfig
        import torch
        small = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
        model = llama.LlamaModel(LlamaConfig(**small))
        def complain(seen): raise ValueError
        try:
            with tap(complain): model(torch.ones(1, 2, dtype=torch.long))
        except ValueError as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == llama.__file__]
            print(frames[-1].line)
    """)
    assert "attention_interface(" in out


def test_a_local_copy_wins(tmp_path: Path):
    copy = tmp_path / "llama" / "modeling_llama.py"
    copy.parent.mkdir()
    copy.write_text(
        "from ...activations import ACT2FN\n"
        "class Mine:\n"
        "    def forward(self, q, k, v):\n"
        "        if __sniffer_tap__.observer is not None:\n"
        "            __sniffer_tap__.observe(self, q, k, v)\n"
    )
    out = fresh(f"""
        from sniffer.models import finder
        finder.install(__import__("pathlib").Path({str(tmp_path)!r}))
        import {LLAMA} as llama
        from sniffer.tap import tap
        seen = []
        with tap(seen.append): llama.Mine().forward(1, 2, 3)
        print(llama.__file__, llama.__package__, len(llama.ACT2FN) > 3, seen[0].k, sorted(llama.__sniffer_classes__))
    """)
    assert out == f"{copy} transformers.models.llama True 2 ['Mine']"


BROKEN = {
    "a line that is no Python": ("class A:\n    def f(self:\n", "line 2: SyntaxError"),
    "a name that is not there": ("class A:\n    pass\n\nA.x = nothing\n", "line 4: NameError: name 'nothing'"),
    "an import that fails": ("import no_such_package_at_all\n", "line 1: ModuleNotFoundError"),
    "bytes that are no text": (b"a = '\xff'\n", "SyntaxError"),
    "a zero byte": (b"a = 1\0\n", "source code string cannot contain null bytes"),
    "an exception": ("raise RuntimeError\n", "line 1: RuntimeError"),
}


@pytest.mark.long
def test_a_copy_that_cannot_be_imported_is_named_with_its_line(tmp_path: Path):
    """Whichever way transformers comes to import it, and whatever it makes of the error."""
    copies = {}
    for number, (content, _) in enumerate(BROKEN.values()):
        copies[number] = tmp_path / str(number) / "llama" / "modeling_llama.py"
        copies[number].parent.mkdir(parents=True)
        copies[number].write_bytes(content if isinstance(content, bytes) else content.encode())
    out = fresh(f"""
        from pathlib import Path
        from transformers import LlamaConfig
        from sniffer.errors import UnsupportedModelError
        from sniffer.models import finder, outline, weights
        for number in range({len(BROKEN)}):
            finder.uninstall()
            finder.install(Path({str(tmp_path)!r}) / str(number))
            for load in (
                lambda: weights.draw(LlamaConfig(), 0, weights.How(), "it"),
                lambda: outline.outline(LlamaConfig(), "auto", False, "it"),
            ):
                try:
                    load()
                except UnsupportedModelError as error:
                    print(error)
    """)
    told = out.splitlines()
    assert len(told) == 2 * len(BROKEN)
    for number, (_, wanted) in enumerate(BROKEN.values()):
        for line in told[2 * number : 2 * number + 2]:
            assert line.startswith(str(copies[number])) and wanted in line and "remove it" in line


def test_a_family_imported_too_early_is_named():
    out = fresh(f"""
        import {LLAMA} as llama
        from sniffer.models import finder
        finder.install()
        from sniffer.models.layers import check_imports
        from sniffer.errors import UnsupportedModelError
        from transformers import LlamaConfig
        small = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
        try:
            check_imports(llama.LlamaModel(LlamaConfig(**small)))
        except UnsupportedModelError as error:
            print(error)
    """)
    assert LLAMA in out and "sniffer.models.finder.install()" in out and len(out.splitlines()) == 1
