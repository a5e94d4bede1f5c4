"""A tiny model, tokenizer and text, made on the spot: two random layers, three documents."""

from __future__ import annotations

import json
from pathlib import Path

TEXTS = {
    "first": " ".join(f"the cat number {n} sat on the mat and looked at the moon" for n in range(12)),
    "second": " ".join(f"a dog {n} ran over the hill" for n in range(30)),
    "third": "one short line",
}


def save_checkpoint(folder: Path, family: str = "llama", dtype: str = "float32", **config: object) -> Path:
    """Writes an ordinary checkpoint folder: config, random weights and a byte-level tokenizer."""
    import torch
    from sniffer.models import finder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    finder.install()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)

    small: dict[str, object] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**small, **config}))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, *, adds: bool = True, chat_template: str | None = None) -> Path:
    """Writes a byte-level tokenizer for the checkpoint above, with `<s>` as its beginning, which it may add itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>")
    made.chat_template = chat_template
    made.save_pretrained(folder)
    return folder


def save_texts(path: Path, texts: dict[str, str] | None = None) -> Path:
    """Writes documents as JSON lines with the columns `id` and `text`."""
    rows = [json.dumps({"id": name, "text": text}) for name, text in (texts or TEXTS).items()]
    path.write_text("\n".join(rows) + "\n")
    return path


def overrides(checkpoint: Path, texts: Path, *more: str) -> list[str]:
    """The command line of a run on the tiny model."""
    return [
        "model=checkpoint",
        f"model.checkpoint={checkpoint}",
        "model.device=cpu",
        "dataset=jsonl",
        f"dataset.path={texts}",
        "dataset.id_column=id",
        *more,
    ]
