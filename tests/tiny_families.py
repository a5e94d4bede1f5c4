"""Tiny random models of any family, built from the family's own config class.

There is no table of families here: a config's keys are shrunk by what their names mean, and the result is
tried. Most families build; those that do not say why.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 160
LARGEST = 130_000_000
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "dim_model"), 64),
    **dict.fromkeys(
        (
            "emb_dim",
            "out_hidden_size",
            "text_hidden_size",
            "adapter_in_dim",
            "adapter_input_size",
            "adapter_out_dim",
            "projection_dim",
        ),
        64,
    ),
    **dict.fromkeys(("hidden_size_global", "d_kv", "linear_head_dim", "projection_hidden_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "dim_ff"), 96),
    **dict.fromkeys(("ffn_hidden_size", "shared_expert_intermediate_size", "expert_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("expert_ffn_hidden_size", "projector_hidden_size"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"), 4),
    **dict.fromkeys(("encoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k", "moe_k", "top_k_experts", "num_selected_experts"), 2),
    **dict.fromkeys(("num_experts_per_token",), 2),
    **dict.fromkeys(("n_shared_experts", "num_expert_group", "indexer_kv_heads"), 1),
    **dict.fromkeys(("zero_expert_num", "indexer_n_heads", "indexer_compress_ratio", "linear_num_heads"), 4),
    **dict.fromkeys(("indexer_head_dim",), 16),
    **dict.fromkeys(("indexer_budget", "encoder_hash_byte_group_vocab"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("first_k_dense_replace",), 1),
    **dict.fromkeys(("rotary_dim",), 8),
    **dict.fromkeys(("num_kv_shared_layers",), 2),
    **dict.fromkeys(("n_positions", "n_ctx", "max_position_embeddings"), 128),
    **dict.fromkeys(("mamba_chunk_size",), 16),
    **dict.fromkeys(("max_target_positions", "max_seq_len", "model_max_length"), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
}
FILLED = (
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "n_shared_experts",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "indexer_n_heads",
    "indexer_kv_heads",
    "indexer_head_dim",
    "indexer_budget",
    "indexer_compress_ratio",
)
"""Keys that some default configs leave at None although the model needs a number."""
SEEING = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SEEING |= {
    "num_hidden_layers": 2,
    "image_size": 32,
    "patch_size": 16,
    "model_args": {"embed_dim": 64},
    "vocab_size": 8,
    "vocab_offset": 144,
    "rms_norm_eps": 1e-6,
}
NEED_TIMM = ("fast_vlm", "gemma3n", "perception_lm")
"""A vision tower in place of one that needs the timm package; text never enters it."""
ALTERNATING = ["linear_attention", "full_attention"] * 2
QUIRKS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config": {"codebook_dim": 64, "codebook_size": 16},
        "vision_config": {"codebook_size": 16, "base_channels": 32, "latent_channels": 32},
        "image_token_offset": 100,
        "audio_token_offset": 116,
    },
    "big_bird": {"attention_type": "original_full"},
    "blip": {"text_config": {"is_decoder": True}},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "n_heads": 4, "d_model": 64},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}
    },
    "gemma3n": {
        "text_config": {"vocab_size_per_layer_input": 144},
        "audio_config": {"vocab_size": 8, "vocab_offset": 152},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "ernie4_5_vl_moe": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}
    },
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1]},
    "granitemoehybrid": {
        "layer_types": ALTERNATING,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "position_embedding_type": "rope",
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 2},
    "molmo2": {"adapter_config": {"vision_feature_layer": [3, 2]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "pix2struct": {"text_config": {"hidden_size": 64, "d_kv": 16}},
    "qwen4_exp": {"text_config": {"head_dim": 16}},
    "qwen4_exp_text": {"head_dim": 16},
    "reformer": {"axial_pos_embds": False, "is_decoder": True},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"hybrid_layer_ids": [1, 3], "use_mem_rope": True},
}
"""What the validators and defaults of a few configs demand, or what makes them small or causal."""


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A config of a few thousand parameters' worth; `changes` go to the text model and win."""
    quirks = QUIRKS.get(model_type, {})
    try:
        default = AutoConfig.for_model(model_type)
    except Exception:  # of several libraries: this config is not valid without its quirks
        default = AutoConfig.for_model(model_type, **copy.deepcopy(quirks))
    values = _nested(default, text_of(default), changes)
    for key, value in quirks.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    if not getattr(default, "is_decoder", True) and not getattr(default, "is_encoder_decoder", False):
        values["is_decoder"] = True
    config = AutoConfig.for_model(model_type, **values)
    if model_type in NEED_TIMM:
        # Not by assignment, which some configs check.
        vars(config)["vision_config"] = AutoConfig.for_model(**SEEING)
    return config


def _nested(config: PretrainedConfig, text: PretrainedConfig | None, changes: dict[str, Any]) -> dict[str, Any]:
    """The shrunk keys of a config and of all the configs inside it; `changes` go into the text model's."""
    values = _shrunk(config)
    for name, inner in vars(config).items():
        if isinstance(inner, PretrainedConfig):
            values[name] = {**_nested(inner, text, changes), "model_type": inner.model_type}
    if config is text:
        values.update(changes)
    return values


def text_of(config: PretrainedConfig) -> PretrainedConfig | None:
    """The config of the language model; None where there are several."""
    try:
        return config.get_text_config()
    except ValueError:  # two of them, as in musicgen
        return None


def tiny_model(config: PretrainedConfig, seed: int = 0, attn_implementation: str = "sdpa") -> PreTrainedModel:
    """A seeded random model of that config, in evaluation mode."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        if type(config) in auto._model_mapping:
            _check_size(auto, config)
            torch.manual_seed(seed)
            model = auto.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
            return _stirred(model.eval())
    raise ValueError(f"{type(config).__name__} is no language model")


def _check_size(auto: Any, config: PretrainedConfig) -> None:
    """Counts parameters before memory is taken for them."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f}M parameters are left after shrinking, more than {LARGEST / 1e6:.0f}M")


def tiny_ids(batch: int = 2, seq: int = 24, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, VOCABULARY - 1, (batch, seq), generator=generator)


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    keys = config.to_dict()
    for key, small in SMALL.items():
        present = keys.get(key, getattr(type(config), key, None))
        if isinstance(present, int) and not isinstance(present, bool) and key not in config.attribute_map:
            values[key] = min(small, present) if present > 0 else present
        elif present is None and key in FILLED and key in keys:
            values[key] = small
    if _has_plain_head_dim(config):
        values["head_dim"] = 16
    if "num_key_value_heads" in values and keys["num_key_value_heads"] == keys.get("num_attention_heads"):
        values["num_key_value_heads"] = 4
    for key, value in keys.items():
        if key.endswith("token_id") and isinstance(value, int) and value >= 20:
            values[key] = len(values) % 15 + 2
    for key in ("attn_layer_indices", "attention_layers_idx", "hybrid_layer_ids"):
        if isinstance(getattr(config, key, "no"), (list, type(None))):
            values[key] = [1, 2]
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        listed = keys.get(key)
        settable = not isinstance(getattr(type(config), key, None), property)
        if settable and isinstance(listed, (list, tuple)) and len(set(listed)) > 1 and len(listed) > 4:
            values[key] = _one_of_each(list(listed))
    if "attn_layer_offset" in keys:
        values |= {"attn_layer_offset": 1, "attn_layer_period": 2}
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope and "mrope_section" in _modelling_source(config):
        rotated = (
            int((values.get("head_dim") or keys.get("head_dim") or 16) * rope.get("partial_rotary_factor", 1.0)) // 2
        )
        values["rope_parameters"] = {
            **rope,
            "mrope_section": [rotated - 2 * (rotated // 3), *[rotated // 3] * 2],
        }
    return values


def _has_plain_head_dim(config: PretrainedConfig) -> bool:
    """Whether head_dim is a key of its own that is unset, or is the width over the heads, for every layer."""
    keys = config.to_dict()
    if (
        "head_dim" not in keys
        or "qk_rope_head_dim" in keys
        or isinstance(getattr(type(config), "head_dim", 0), property)
    ):
        return False
    return keys["head_dim"] is None or keys["head_dim"] * keys.get("num_attention_heads", 0) == keys.get("hidden_size")


def _modelling_source(config: PretrainedConfig) -> str:
    path = Path(inspect.getfile(type(config)))
    modelling = path.with_name(path.name.replace("configuration_", "modeling_"))
    return modelling.read_text(encoding="utf-8") if modelling.is_file() else ""


def _one_of_each(listed: list[Any]) -> list[Any]:
    """Four entries that go round the kinds of layers."""
    kinds = list(dict.fromkeys(listed))[:4]
    return [kinds[i % len(kinds)] for i in range(4)]


def _stirred(model: PreTrainedModel) -> PreTrainedModel:
    """Makes every parameter matter: fresh models have zeros and ones in many places."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    return model
