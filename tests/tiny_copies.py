"""Hand-edited copies of llama's modelling file, imported in this process in the place of the upstream module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sniffer.models import finder
from sniffer.models.copy import tapped_source

from tests.tiny_families import tiny_config

LLAMA = "transformers.models.llama.modeling_llama"
ROTATE = "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)"
ATTEND = "attn_output, attn_weights = __sniffer_tap__.attending(attention_interface, self, __name__)("
GUARD = "if __sniffer_tap__.observer is not None:"


def llama_source() -> str:
    """The tapped copy as `python -m sniffer.models.copy llama` writes it, without its heading."""
    upstream = Path(str(importlib.import_module(LLAMA).__file__))
    return tapped_source(upstream.read_text(encoding="utf-8"), str(upstream))


def tap_line(source: str) -> str:
    """The one that shows what attention is about to receive."""
    return next(line.strip() for line in source.splitlines() if "__sniffer_tap__.observe(" in line)


def edited(old: str, new: str) -> str:
    """The copy with one passage replaced, which must be there."""
    source = llama_source()
    assert source.count(old) == 1, old
    return source.replace(old, new)


def write_copy(copies: Path, source: str) -> Path:
    path = copies / "llama" / "modeling_llama.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return path


@contextmanager
def imported(copies: Path) -> Iterator[ModuleType]:
    """The module that an import gives where the copies lie there; afterwards everything is as before."""
    before, hooks = sys.modules.pop(LLAMA, None), list(sys.meta_path)
    finder.uninstall()
    finder.install(copies)
    try:
        yield importlib.import_module(LLAMA)
    finally:
        sys.meta_path[:] = hooks
        sys.modules.pop(LLAMA, None)
        if before is not None:
            sys.modules[LLAMA] = before
            sys.modules[LLAMA.rpartition(".")[0]].modeling_llama = before  # type: ignore[attr-defined]


def model_of(module: ModuleType, **config: Any) -> Any:
    """A tiny model made of a copy's classes."""
    made = module.LlamaModel(tiny_config("llama", num_hidden_layers=2, **config))
    return made.eval()
