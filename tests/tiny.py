"""A tiny random Llama with a byte tokenizer, and three texts of different lengths.

Two layers, four query heads and two key heads of dimension 8; one token per byte, no special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

TEXTS = {
    "short": "A short text of a few words only.",
    "middle": "The quick brown fox jumps over the lazy dog, again and again. " * 6,
    "long": "It was the best of times, it was the worst of times, it was the age of wisdom. " * 12,
}


def save_checkpoint(folder: Path) -> Path:
    """Writes model and tokenizer as an ordinary checkpoint folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from models import finder

    finder.install()  # before the family's module is imported, which the next line does
    from transformers import LlamaForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_texts(path: Path, texts: Mapping[str, str] = TEXTS) -> Path:
    """Writes texts as JSON lines with the columns id and text."""
    lines = [json.dumps({"id": source_id, "text": text}) for source_id, text in texts.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def overrides(checkpoint: Path, texts: Path, *more: str) -> tuple[str, ...]:
    """The command line of a run of that checkpoint over those texts."""
    return (
        "model=checkpoint",
        f"model.checkpoint={checkpoint}",
        "model.device=cpu",
        "dataset=jsonl",
        f"dataset.path={texts}",
        "dataset.id_column=id",
        *more,
    )
