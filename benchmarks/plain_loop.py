"""What a person would write without this project: each document through the backbone by transformers, nothing captured.

python plain_loop.py CHECKPOINT_FOLDER DOCUMENTS MAX_TOKENS
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModel, AutoTokenizer

from sniffer.dataset.packages import Pydoc


@torch.inference_mode()
def main(folder: str, documents: str, max_tokens: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for _, _, text in Pydoc(max_examples=int(documents)).texts():
        tokens = tokenizer(text, truncation=True, max_length=int(max_tokens), return_tensors="pt")
        model(input_ids=tokens.input_ids, use_cache=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
