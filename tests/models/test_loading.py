"""Loading as people load: attention implementations, device maps, GGUF files, nested overrides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder, weights
from sniffer.models.backbone import Checkpoint
from sniffer.models.loaded import LoadedBackbone

from sniffer.errors import CheckpointError, ConfigError
from sniffer.tap import Seen, tap
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

finder.install()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 checkpoint, with sliding and full layers."""
    path = tmp_path_factory.mktemp("gemma")
    kinds = ["sliding_attention", "full_attention"] * 2
    tiny_model(tiny_config("gemma3_text", sliding_window=8, layer_types=kinds)).save_pretrained(path)
    return path


def load(folder: Path, **changes: Any) -> LoadedBackbone:
    return Checkpoint(str(folder), **{"device": "cpu", **changes}).load()


def events(backbone: LoadedBackbone) -> list[Seen]:
    seen: list[Seen] = []
    with torch.inference_mode(), tap(seen.append, pre=True):
        backbone(tiny_ids())
    return seen


SLOW = pytest.mark.skipif("SNIFFER_SLOW_TESTS" not in os.environ, reason="compiles for a minute")


@pytest.mark.parametrize("implementation", ["eager", "auto", pytest.param("flex_attention", marks=SLOW)])
def test_no_implementation_loses_its_masks(folder: Path, implementation: str):
    reference, other = (
        events(load(folder, attn_implementation="sdpa")),
        events(load(folder, attn_implementation=implementation)),
    )
    assert len(reference) == len(other) == 4
    for mine, theirs in zip(other, reference, strict=True):
        for kind in ("q", "k", "v", "q_pre", "k_pre"):
            assert torch.allclose(getattr(mine, kind), getattr(theirs, kind), atol=1e-4)
        assert mine.sliding_window == theirs.sliding_window


def test_what_was_used_is_recorded(folder: Path):
    assert load(folder).describe()["attn_implementation"] == "sdpa"
    assert load(folder, attn_implementation="eager").describe()["attn_implementation"] == "eager"


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_changes_nothing_but_the_place(folder: Path, device_map: Any):
    pytest.importorskip("accelerate")
    mapped = Checkpoint(str(folder), device_map=device_map).load()
    for mine, theirs in zip(events(mapped), events(load(folder)), strict=True):
        assert torch.equal(mine.q.cpu(), theirs.q)


def test_a_model_whose_parameters_are_offloaded_runs_where_they_are_used(folder: Path):
    accelerate = pytest.importorskip("accelerate")
    plain = load(folder)
    expected = events(plain)
    offloaded = accelerate.cpu_offload(plain.module, execution_device=torch.device("cpu"))
    assert offloaded.device.type == "meta"
    backbone = LoadedBackbone(offloaded)
    assert backbone.device.type == "cpu"
    for mine, theirs in zip(events(backbone), expected, strict=True):
        assert torch.equal(mine.q, theirs.q)


@pytest.mark.parametrize("device_map", [[], {}, True, 1.5, " ", {"": None}, {"": [0]}])
def test_what_is_no_device_map_is_refused(device_map: Any):
    with pytest.raises(ConfigError, match="model.device_map=.* is no map"):
        Checkpoint("nobody/nothing", device_map=device_map)


def test_device_and_device_map_exclude_each_other(folder: Path):
    with pytest.raises(ConfigError, match="both set"):
        Checkpoint(str(folder), device="cpu", device_map="auto")
    with pytest.raises(ConfigError, match="use model.device"):
        Checkpoint("nobody/nothing", weights="random", model_type="llama", device_map="auto").load()


def test_nested_overrides_reach_the_rotation(tmp_path: Path):
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    overrides = {"max_position_embeddings": 128, "rope_parameters": yarn}
    stretched = Checkpoint(str(tmp_path), device="cpu", config_overrides=overrides)
    assert stretched._config().rope_parameters == {"rope_theta": 10000.0, **yarn}
    assert stretched.limits().max_positions == 128
    mine, theirs = events(stretched.load())[0], events(load(tmp_path))[0]
    assert torch.equal(mine.q_pre, theirs.q_pre) and not torch.allclose(mine.q, theirs.q)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A tiny Llama as a GGUF file, written by the format's own package."""
    return written_gguf(tmp_path / "tiny.gguf")


def written_gguf(path: Path, without: str = "") -> Path:
    gguf = pytest.importorskip("gguf")
    width, hidden, heads, key_heads, vocabulary = 32, 48, 4, 2, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    writer.add_rope_freq_base(10000.0)
    random = np.random.default_rng(0)
    key_width = width // heads * key_heads
    shapes = {"attn_q": (width, width), "attn_k": (key_width, width), "attn_v": (key_width, width)}
    shapes |= {"attn_output": (width, width), "ffn_gate": (hidden, width), "ffn_up": (hidden, width)}
    shapes |= {"ffn_down": (width, hidden), "attn_norm": (width,), "ffn_norm": (width,)}
    tensors = {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in shapes.items()}
    tensors |= {
        "token_embd.weight": (vocabulary, width),
        "output_norm.weight": (width,),
        "output.weight": (vocabulary, width),
    }
    for name, shape in tensors.items():
        if name != without:
            writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_a_checkpoint(gguf_file: Path):
    checkpoint = Checkpoint(str(gguf_file), device="cpu", dtype="float32")
    checkpoint.check()
    limits = checkpoint.limits()
    assert (limits.layers, limits.query_heads, limits.key_heads) == (2, 4, 2)
    backbone = checkpoint.load()
    expected = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    # The file keeps the halves of each rotary pair side by side; transformers keeps them apart.
    loaded = backbone.module.layers[0].self_attn.q_proj.weight.detach().numpy()
    assert np.array_equal(np.sort(loaded, axis=None), np.sort(expected, axis=None))
    assert len(backbone.geometry) == 2
    described = checkpoint.describe()
    assert described["gguf_file"] == "tiny.gguf" and list(described["files"]) == ["tiny.gguf"]
    assert Checkpoint(str(gguf_file.parent), gguf_file="tiny.gguf", device="cpu").limits() == limits


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path):
    path = written_gguf(tmp_path / "tiny.gguf", without="blk.1.attn_k.weight")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(model.layers.1.self_attn.k_proj.weight\)"):
        Checkpoint(str(path), device="cpu", dtype="float32").load()


def test_a_gguf_file_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no there\.gguf"):
        Checkpoint(str(tmp_path / "there.gguf")).check()


def test_a_package_that_is_missing_is_told_with_how_to_get_it():
    said = "\nIt requires the timm library. You can install it with pip:\n`pip install timm`. Then restart.\n"
    told = str(weights._unloadable(ImportError(said), "sdpa", "a checkpoint"))
    assert told.endswith("You can install it with pip: `pip install timm`. Then restart.") and "\n" not in told
