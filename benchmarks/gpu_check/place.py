"""Where it is measured, and what on: models of real shapes with random weights, batches of random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sniffer.models import kernels
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from transformers import AutoConfig, AutoModelForCausalLM

from sniffer.types import Document, TokenBatch

Found = dict[str, Any]

VOCABULARY = 4096
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
WIDTHS = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""Llama 3's, but for the vocabulary, which a backbone without its head hardly notices."""


@dataclass(frozen=True)
class Place:
    """Where it is measured, and how large: `full` on a GPU."""

    device: torch.device
    full: bool

    @property
    def widths(self) -> tuple[str, ...]:
        return tuple(WIDTHS) if self.full else ("small",)

    def config(self, width: str = "1B", family: str = "llama", **more: Any) -> Any:
        shape = WIDTHS[width] if self.full else SMALL
        common = {"num_key_value_heads": 8 if self.full else 4, "vocab_size": VOCABULARY}
        dim = shape["hidden_size"] // shape["num_attention_heads"]
        longest = {"max_position_embeddings": 131072}
        return AutoConfig.for_model(family, **{**shape, **common, "head_dim": dim, **longest, **more})

    def model(self, dtype: torch.dtype, width: str = "1B", family: str = "llama", **more: Any) -> LoadedBackbone:
        """Random weights, drawn on the device: a large model takes a second there, and minutes on a processor."""
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(self.config(width, family, **more), dtype=dtype)
        return LoadedBackbone(find_backbone(model.eval().requires_grad_(False)), kernels.DEFAULT)

    def same_model(self, dtype: torch.dtype, **more: Any) -> LoadedBackbone:
        """Few layers, whose random weights are drawn on the processor: the same wherever it is."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config(num_hidden_layers=4, **more), dtype=torch.float32)
        model = model.to(dtype).to(self.device).eval().requires_grad_(False)
        return LoadedBackbone(find_backbone(model), kernels.DEFAULT)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def batch_of(lengths: Sequence[int], first: int = 0) -> TokenBatch:
    """Documents of so many random tokens, numbered from `first`."""
    chance = np.random.default_rng(first)
    documents = [
        Document(first + row, str(first + row), chance.integers(1, VOCABULARY, n, dtype=np.int32), truncated=False)
        for row, n in enumerate(lengths)
    ]
    return TokenBatch(tuple(documents), 0)
