"""Backbones: identical to the untapped model, shown truly, numbered rightly, refused where unsound."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from sniffer.models import devices, finder, locate, selfcheck, weights, witness
from sniffer.models.architecture import build_config, override
from sniffer.models.backbone import Checkpoint
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from transformers import AutoTokenizer, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sniffer.errors import CheckpointError, ConfigError, UnsupportedModelError
from sniffer.tap import TAP, Seen, tap
from sniffer.types import ModelLimits
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

finder.install()

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def random_llama(**changes: Any) -> Checkpoint:
    return Checkpoint("nobody/nothing", weights="random", model_type="llama", device="cpu", **changes)


def random_bloom(**changes: Any) -> Checkpoint:
    tiny = {"n_layer": 1, "hidden_size": 32, "n_head": 4, "vocab_size": 64}
    named = {"weights": "random", "model_type": "bloom", "device": "cpu"}
    return Checkpoint("nobody/nothing", config_overrides=tiny, **named, **changes)


def load(model_type: str, **changes: Any) -> LoadedBackbone:
    return LoadedBackbone(find_backbone(tiny_model(tiny_config(model_type, **changes))))


def events(backbone: LoadedBackbone, ids: torch.Tensor, *, pre: bool = False) -> list[Seen]:
    seen: list[Seen] = []
    with torch.inference_mode(), tap(seen.append, pre=pre):
        backbone(ids)
    return seen


def test_rotating_the_pre_vectors_gives_the_post_ones():
    backbone = load("llama")
    ids = tiny_ids()
    llama = sys.modules[type(backbone.module).__module__]
    cos, sin = backbone.module.rotary_emb(torch.zeros(1), torch.arange(ids.shape[1])[None])
    for event in events(backbone, ids, pre=True):
        q, k = llama.apply_rotary_pos_emb(event.q_pre, event.k_pre, cos, sin)
        assert torch.equal(q, event.q) and torch.equal(k, event.k)
        assert not torch.equal(event.q, event.q_pre)


def test_attention_of_full_layers_gets_no_mask_and_is_causal(monkeypatch: pytest.MonkeyPatch):
    backbone = load("llama")
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((kwargs["attn_mask"], kwargs["is_causal"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.inference_mode():
        backbone(tiny_ids())
    assert calls == [(None, True)] * 4


def test_a_sliding_layer_keeps_its_mask_and_says_its_window(monkeypatch: pytest.MonkeyPatch):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    backbone = load("gemma3_text", sliding_window=8, layer_types=kinds)
    assert [layer.sliding_window for layer in backbone.geometry] == [8, None, 8, None]
    masks = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        masks.append(kwargs["attn_mask"] is not None)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.inference_mode():
        backbone(tiny_ids())
    assert masks == [True, False, True, False]


def test_geometry_and_layer_numbers():
    backbone = load("llama", num_key_value_heads=2)
    assert [layer.layer for layer in backbone.geometry] == [0, 1, 2, 3]
    assert [layer.module for layer in backbone.geometry] == [f"layers.{i}.self_attn" for i in range(4)]
    assert dict(backbone.geometry[0].heads) == {"q": 4, "k": 2, "v": 2, "q_pre": 4, "k_pre": 2}
    assert set(backbone.geometry[0].dims.values()) == {16} and backbone.geometry[0].scaling == 0.25
    assert [backbone.layer_of[event.module] for event in events(backbone, tiny_ids())] == [0, 1, 2, 3]


def test_layers_without_softmax_attention_are_listed_and_keep_their_numbers():
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    backbone = load("qwen3_next", layer_types=kinds)
    assert [layer.layer for layer in backbone.geometry] == [1, 3]
    assert backbone.skipped_layers == ("layers.0", "layers.2")


def test_mla_has_dims_of_its_own():
    (first, *_) = load("deepseek_v3", qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=20).geometry
    assert (first.dims["q"], first.dims["k"], first.dims["v"]) == (24, 24, 20)


def test_a_language_model_inside_a_vision_model_is_found():
    model = tiny_model(tiny_config("gemma3"))
    assert find_backbone(model) is model.get_decoder()
    assert type(find_backbone(model)).__name__ == "Gemma3TextModel"


def test_a_bidirectional_backbone_is_refused():
    config = tiny_config("bert", is_decoder=False)
    with pytest.raises(UnsupportedModelError, match="not causal"):
        LoadedBackbone(find_backbone(tiny_model(override(config, {"is_decoder": False}))))


def with_nan(name: str, *rows: int, causal: bool = True) -> LoadedBackbone:
    """A tiny Llama with NaN in some rows of a parameter; it may attend to later tokens."""
    model = tiny_model(tiny_config("llama"))
    with torch.no_grad():
        model.get_parameter(name)[list(rows)] = torch.nan
    model.config.is_causal = causal
    for layer in model.model.layers:
        layer.self_attn.is_causal = causal
    return LoadedBackbone(find_backbone(model))


def test_of_nothing_but_nan_nothing_is_shown():
    """Neither that a model is causal, nor that it is not; so it is refused, and by name."""
    for causal in (True, False):
        with pytest.raises(UnsupportedModelError, match="LlamaAttention, attention 3 of 4, is given nothing but NaN"):
            with_nan("model.layers.1.mlp.down_proj.weight", 0, causal=causal)


def test_nan_of_some_tokens_neither_hides_that_a_model_is_not_causal_nor_makes_it_so():
    some = selfcheck.probe_ids(99, torch.device("cpu"))[0, 4].item()
    with pytest.raises(UnsupportedModelError, match="not causal"):
        with_nan("model.embed_tokens.weight", some, causal=False)
    assert len(with_nan("model.embed_tokens.weight", some).geometry) == 4
    assert len(with_nan("model.layers.3.mlp.down_proj.weight", 0).geometry) == 4  # no layer attends after it


def test_a_model_without_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match="no attention of Mamba"):
        LoadedBackbone(find_backbone(tiny_model(tiny_config("mamba"), attn_implementation="eager")))


def test_an_implementation_that_a_family_lacks_is_refused_with_advice():
    with pytest.raises(ConfigError, match="attn_implementation=auto"):
        random_bloom(attn_implementation="sdpa").load()
    assert random_bloom().load().module.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("tampered", "complaint"),
    [
        (lambda real: lambda module, q, *rest, **kw: real(module, q.clone(), *rest, **kw), "other tensors"),
        (lambda real: lambda *rest, **kw: (real(*rest, **kw), real(*rest, **kw)), "2 times"),
        (lambda real: lambda *rest, **kw: None, "no attention of this model is tapped"),
        (
            lambda real: lambda module, q, *rest, **kw: real(module, q.transpose(1, 2), *rest, **kw),
            "expected",
        ),
    ],
)
def test_the_self_check_catches_a_tap_that_lies(monkeypatch: pytest.MonkeyPatch, tampered: Any, complaint: str):
    module = find_backbone(tiny_model(tiny_config("llama")))
    monkeypatch.setattr(TAP, "observe", tampered(TAP.observe))
    with pytest.raises(UnsupportedModelError, match=complaint):
        LoadedBackbone(module)


def test_attention_functions_are_given_back_after_an_exception():
    before, own = dict(ALL_ATTENTION_FUNCTIONS.items()), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with pytest.raises(KeyError), witness.witnessed():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before["sdpa"]
        raise KeyError
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == before and ALL_ATTENTION_FUNCTIONS._local_mapping == own


def test_random_weights_follow_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (random_llama(config_overrides=TINY, seed=seed).load() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    weights = [backbone.module.layers[0].self_attn.q_proj.weight for backbone in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("model_type", ["jamba", "llama"])
def test_a_backbone_computes_what_its_model_computed_before(model_type: str):
    """In float16 products are folded or not by whether a weight asks for gradients: so that is left as it is."""
    model = tiny_model(tiny_config(model_type)).to(torch.float16)
    module, flags = find_backbone(model), [parameter.requires_grad for parameter in model.parameters()]

    def output() -> torch.Tensor:
        with torch.inference_mode():
            return module(tiny_ids(), use_cache=False).last_hidden_state

    before = output()
    LoadedBackbone(module)
    assert torch.equal(output(), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_vectors_come_in_the_dtype_asked_for(dtype: str):
    backbone = random_llama(config_overrides=TINY, dtype=dtype).load()
    assert backbone.dtype == getattr(torch, dtype) == events(backbone, tiny_ids() % 60)[0].q.dtype


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_both_implementations_attend_with_the_same_first_vectors(attn_implementation: str):
    backbone = random_llama(config_overrides=TINY, attn_implementation=attn_implementation).load()
    reference = random_llama(config_overrides=TINY).load()
    ids = tiny_ids() % 60
    assert torch.equal(events(backbone, ids)[0].k, events(reference, ids)[0].k)


def test_limits_come_from_the_config_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "draw", lambda *arguments: pytest.fail("weights were drawn"))
    limits = random_llama(config_overrides=TINY).limits()
    assert (limits.layers, limits.query_heads, limits.key_heads, limits.max_positions) == (2, 4, 2, 2048)


def test_overrides_are_merged_placed_and_checked():
    config = build_config("gemma3", {"num_hidden_layers": 2, "hidden_size": 64})
    assert config.text_config.num_hidden_layers == 2 and len(config.text_config.layer_types) == 2
    llama = build_config("llama", {"rope_parameters": {"rope_theta": 7.0}})
    assert llama.rope_parameters == {"rope_theta": 7.0, "rope_type": "default"}
    deep = build_config("qwen3", {"num_hidden_layers": 6})
    assert len(override(deep, {"num_hidden_layers": 3}).layer_types) == 3
    with pytest.raises(ConfigError, match="hiden_size is no key of a llama config"):
        build_config("llama", {"hiden_size": 3})
    with pytest.raises(ConfigError, match="no architecture"):
        build_config("lama", {})


def test_keys_whose_values_differ_by_layer_can_be_overridden():
    if "gemma4_text" not in CONFIG_MAPPING_NAMES:
        pytest.skip("this transformers has no gemma4_text")
    kinds = ["sliding_attention", "full_attention"] * 2
    tiny = {"head_dim": 16, "num_hidden_layers": 4, "layer_types": kinds}
    config = build_config("gemma4_text", tiny)

    def widths(config: Any) -> list[int]:
        return [config.per_layer_config[layer].head_dim for layer in range(config.num_hidden_layers)]

    assert widths(config) == [16, 512, 16, 512]
    assert widths(override(config, {"head_dim": 8})) == [8, 512, 8, 512]
    shorter = override(config, {"num_hidden_layers": 2})
    assert widths(shorter) == [16, 512] and shorter.layer_types == kinds[:2]
    with pytest.raises(ConfigError, match="hed_dim is no key"):
        override(config, {"hed_dim": 8})


def test_limits_are_unknown_where_they_differ_by_layer(monkeypatch: pytest.MonkeyPatch):
    class Uneven:
        num_hidden_layers = 4

        @property
        def num_key_value_heads(self) -> int:
            raise RuntimeError("it varies across layers")

        num_attention_heads = max_position_embeddings = num_key_value_heads

        def get_text_config(self) -> Uneven:
            return self

    monkeypatch.setattr(Checkpoint, "_config", lambda self: Uneven())
    assert random_llama().limits() == ModelLimits(4, None, None, None)


def test_the_config_group_is_typed():
    structured = OmegaConf.structured(Checkpoint)
    values = OmegaConf.to_container(OmegaConf.merge(structured, {"checkpoint": "a/b"}))
    assert Checkpoint(**values) == Checkpoint("a/b")
    with pytest.raises(Exception, match="not a valid bool"):
        OmegaConf.merge(structured, {"trust_remote_code": "perhaps"})


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"weights": "none"}, "model.weights='none' is not one of pretrained, random"),
        ({"dtype": "float8"}, "model.dtype"),
        ({"device": "abacus"}, "model.device"),
        ({"checkpoint": " "}, "model.checkpoint is empty"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        Checkpoint(**{"checkpoint": "a/b", **values})


def test_random_weights_need_an_architecture():
    with pytest.raises(ConfigError, match="model.model_type"):
        Checkpoint("nobody/nothing", weights="random").limits()


def test_folders_that_are_no_checkpoints(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(str(tmp_path / "nowhere")).limits()
    with pytest.raises(CheckpointError, match="no config.json"):
        Checkpoint(str(tmp_path)).limits()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not all its weights"):
        Checkpoint(str(tmp_path)).limits()


def test_a_broken_checkpoint_is_one_line(tmp_path: Path):
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path)
    weights_file, config_file = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, config = weights_file.read_bytes(), json.loads(config_file.read_text())
    weights_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Checkpoint(str(tmp_path), device="cpu").load()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="the tokenizer of .* cannot be loaded"):
        Checkpoint(str(tmp_path)).load_tokenizer()
    # Early releases of transformers 5 take any value here, and fail when the model is built.
    strict = hasattr(PretrainedConfig, "validate")
    for key, value in (("num_hidden_layers", "two"), ("num_attention_heads", 3)) if strict else ():
        config_file.write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match="the config of .* cannot be read"):
            Checkpoint(str(tmp_path)).limits()


def test_a_device_that_is_not_there_is_refused_before_the_weights(monkeypatch: pytest.MonkeyPatch):
    def drawn(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were drawn")

    monkeypatch.setattr(weights, "auto_class", drawn)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("cuda:1", "cuda:7"):
        with pytest.raises(ConfigError, match=f"model.device={device}: torch sees 1 such devices"):
            devices.device_of(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="model.device=cuda"):
        Checkpoint("nobody/nothing", weights="random", model_type="llama", device="cuda").load()


def hub_that(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from huggingface_hub import HfApi, constants

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(HfApi, "model_info", refuse)


def hub_errors() -> dict[str, Exception]:
    from types import SimpleNamespace

    from huggingface_hub import errors

    answer: Any = SimpleNamespace(status_code=503, headers={}, request=None)
    return {
        "is gated": errors.GatedRepoError("gated", response=answer),
        "is not found": errors.RepositoryNotFoundError("missing", response=answer),
        "has no revision": errors.RevisionNotFoundError("missing", response=answer),
        "the hub answered 503": errors.HfHubHTTPError("busy", response=answer),
        "no network": OSError("Name or service not known"),
    }


@pytest.mark.parametrize("complaint", list(hub_errors()))
def test_the_hub_s_answers_in_one_line(monkeypatch: pytest.MonkeyPatch, complaint: str):
    hub_that(monkeypatch, hub_errors()[complaint])
    with pytest.raises(CheckpointError, match=complaint) as caught:
        Checkpoint("nobody/nothing").check()
    assert "\n" not in str(caught.value) and "nobody/nothing" in str(caught.value)


def test_a_saved_checkpoint_loads_as_it_was(tmp_path: Path):
    model = tiny_model(tiny_config("llama"))
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path), device="cpu")
    loaded = checkpoint.load()
    with torch.inference_mode():
        expected = model.model(tiny_ids(), use_cache=False).last_hidden_state
        assert torch.equal(loaded(tiny_ids()), expected)
    described = checkpoint.describe()
    assert described["model_type"] == "llama" and described["files"]["model.safetensors"].startswith("sha256:")


def test_a_cached_hub_snapshot_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path)
    hub_that(monkeypatch, OSError("the hub was asked"))
    monkeypatch.setattr(locate, "cached", lambda checkpoint, revision, needed: tmp_path)
    assert Checkpoint("nobody/nothing").limits().layers == 4


def test_an_architecture_alone_has_room_for_the_stand_in_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text('{"vocab_size": 49152}')
    monkeypatch.setattr(locate.embedded, "path", lambda name: tmp_path)
    assert random_llama()._config().vocab_size == 49152
    assert random_llama(config_overrides=TINY)._config().vocab_size == 64


def test_a_snapshot_that_lacks_a_shard_is_not_complete(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_text("")
    assert locate.locate(str(tmp_path), None) == str(tmp_path)
    weights = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    with pytest.raises(CheckpointError, match="not all its weights"):
        locate.locate(str(tmp_path), None)


def test_a_hub_that_stays_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    forever = threading.Event()
    monkeypatch.setattr(locate, "PATIENCE_S", 0.01)
    hub_that(monkeypatch, OSError())
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: forever.wait(60))
    with pytest.raises(CheckpointError, match="no network.*no answer"):
        Checkpoint("nobody/nothing").check()
    forever.set()


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch):
    class Tokenizer:
        pad_token_id, eos_token_id = None, 3

        def __len__(self) -> int:
            return 1000

    monkeypatch.setattr(Checkpoint, "_tokenizer_source", lambda self: ("there", None, {}))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: Tokenizer())
    with pytest.raises(ConfigError, match="64 is smaller than the 1000 tokens.*vocab_size=1000"):
        random_llama(config_overrides=TINY).load_tokenizer()
    assert random_llama(config_overrides={**TINY, "vocab_size": 1000}).load_tokenizer()[1] == 3
