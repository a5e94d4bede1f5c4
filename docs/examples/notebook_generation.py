"""`sniffer.sniff` around `model.generate`: batched, padded on the left, in chunks; and two models for images and text.

    python docs/examples/notebook_generation.py [CHECKPOINT]

CHECKPOINT is a local folder or a hub id; without one, the models are tiny and random, and nothing is downloaded.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, LlavaConfig
from transformers import Gemma3ForConditionalGeneration as Gemma3
from transformers import LlavaForConditionalGeneration as Llava

import sniffer

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_gemma3() -> Any:
    window = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3(Gemma3Config(text_config={**TEXT, **window}, vision_config=VISION, image_token_id=299)).eval()


def tiny_llava() -> Any:
    parts = {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    }
    return Llava(LlavaConfig(**parts, image_token_id=299)).eval()


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two of 12 and 7 tokens, the shorter one padded on the left."""
    ids = torch.arange(30, 54).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids * mask, mask


def show(name: str, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """The same rows, whole or in chunks, side by side or alone."""
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = []
    for how, more in {"at once": {}, "in chunks of 5": {"prefill_chunk_size": 5}}.items():
        with sniffer.sniff(model, sampler="all", kinds=["q", "k"]) as captured:
            model.generate(ids, attention_mask=mask, **told, **more)
        found.append(captured)
        print(f"{name}, {how}: {captured}")
    with sniffer.sniff(model, sampler="all", example_ids=[1]) as alone:
        model.generate(ids[1:][:, mask[1].bool()], **told)
    layer = alone.selection.layers[-1]
    first = alone.vectors(layer=layer, head=0)
    for captured in found:
        other = captured.vectors(layer=layer, head=0)
        mine = other.example_ids == 1
        apart = float(np.abs(other.vectors[mine] - first.vectors).max())
        print(f"  document 1 beside another and alone: {mine.sum()} positions, largest difference {apart:.1e}")
    pairs = found[0].pairs(layer=layer, q_head=0)
    print(f"  {len(pairs)} pairs of q and k in layer {layer}")


def main(checkpoint: str | None = None) -> None:
    torch.manual_seed(0)
    if checkpoint is None:
        for name, model in (("gemma3", tiny_gemma3()), ("llava", tiny_llava())):
            show(name, model, *prompts())
        return
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(["Once upon a time there was a", "The capital of France"], return_tensors="pt", padding=True)
    show(
        checkpoint, AutoModelForCausalLM.from_pretrained(checkpoint).eval(), batch["input_ids"], batch["attention_mask"]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
