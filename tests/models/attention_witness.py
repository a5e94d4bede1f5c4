"""Weights that transformers itself returns for some texts, attending step by step: run as a process of its own.

    python -m tests.models.attention_witness OUT.npz TEXTS.json

TEXTS.json holds token ids by family and number; the models are those of generation_witness.py, without sniff.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.models.generation_witness import CHANGES
from tests.tiny_families import tiny_config, tiny_model


@torch.no_grad()
def weights_of(model: Any, text: list[int]) -> list[np.ndarray]:
    """Of each layer that attends, (heads, tokens, tokens)."""
    found = model(torch.tensor([text]), output_attentions=True, use_cache=False).attentions
    return [one[0].float().numpy() for one in found if one is not None]


def main(out: str, texts: str) -> None:
    found = {}
    for family, by_number in json.loads(Path(texts).read_text()).items():
        model = tiny_model(tiny_config(family, **CHANGES.get(family, {})), attn_implementation="eager")
        for number, text in by_number.items():
            for place, weights in enumerate(weights_of(model, text)):
                found[f"{family}/{number}/{place}"] = weights
    np.savez(out, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
