"""Copies to edit: tapped like the derived module, refused where they would overwrite or show nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from sniffer.models.copy import tapped_source, write_copy
from sniffer.models.derive import derive

from sniffer.errors import UnsupportedModelError
from tests.models.test_finder import fresh

FAMILIES = ("llama", "gemma3", "qwen3_moe", "deepseek_v3", "gptj", "bloom")


def upstream(family: str) -> Path:
    return Path(str(importlib.util.find_spec("transformers").origin)).parent / f"models/{family}/modeling_{family}.py"  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_the_tapped_methods_a_copy_is_the_upstream_text(family: str):
    source = upstream(family).read_text()
    copy = tapped_source(source, "f.py")
    compile(copy, "f.py", "exec")
    comments = [line for line in source.splitlines() if line.startswith(("#", "class ", "def ", "from "))]
    assert [line for line in copy.splitlines() if line in set(comments)] == comments
    assert copy.count("__sniffer_tap__.observe(") == len(derive(source, "f.py").taps)


@pytest.mark.long
def test_a_copy_computes_and_shows_what_the_derived_module_does(tmp_path: Path):
    print(write_copy("llama", tmp_path / "copies"))
    code = """
        import sys, hashlib, torch
        from pathlib import Path
        from sniffer.models import finder
        finder.install(Path({copies!r}))
        from sniffer.models.loaded import LoadedBackbone
        from sniffer.models.layers import find_backbone
        from sniffer.tap import tap
        from tests.tiny_families import tiny_config, tiny_ids, tiny_model
        backbone = LoadedBackbone(find_backbone(tiny_model(tiny_config("llama"))))
        seen = []
        with torch.inference_mode(), tap(seen.append, pre=True):
            states = [backbone(tiny_ids())]
        states += [x for e in seen for x in (e.q, e.k, e.v, e.q_pre, e.k_pre)]
        print(sys.modules[type(backbone.module).__module__].__file__)
        print(len(states), hashlib.sha256(b"".join(s.contiguous().numpy().tobytes() for s in states)).hexdigest())
    """
    mine = fresh(code.format(copies=str(tmp_path / "copies"))).splitlines()
    derived = fresh(code.format(copies=str(tmp_path / "none"))).splitlines()
    assert mine[0] == str(tmp_path / "copies/llama/modeling_llama.py") != derived[0]
    assert mine[1] == derived[1] and mine[1].startswith("21 ")


def test_a_copy_is_never_overwritten(tmp_path: Path):
    path = write_copy("llama", tmp_path)
    path.write_text("mine")
    with pytest.raises(UnsupportedModelError, match="exists: edit it"):
        write_copy("llama", tmp_path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("family", "complaint"), [("lama", "has no models/lama"), ("mamba", "no attention in .* is tapped")]
)
def test_what_cannot_be_copied_is_refused(tmp_path: Path, family: str, complaint: str):
    with pytest.raises(UnsupportedModelError, match=complaint):
        write_copy(family, tmp_path)
    assert not list(tmp_path.iterdir())
