"""What attention is given while transformers itself generates: run as a process of its own, which knows nothing of us.

    python -m tests.models.generation_witness OUT.npz FAMILY ...

The functions that attend are wrapped, one prompt at a time is gone on with, without padding, and what each layer was
given at each step is written down.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from tests.tiny_families import tiny_config, tiny_model

PROMPTS = ([30, 41, 52, 63, 74, 85, 96, 107, 118, 129, 31, 42], [33, 44, 55], [21, 22, 23, 24, 25, 26, 27])
NEW = 14
WINDOW = 6
EAGER = ("gemma2", "gpt_oss", "phi3", "bloom", "gpt_neo")
SLIDING = ("mistral", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss", "cohere2", "olmo3", "exaone4")
CHANGES: dict[str, dict[str, Any]] = dict.fromkeys(SLIDING, {"sliding_window": WINDOW})
CHANGES["llama4_text"] = {"attention_chunk_size": 8}


def model_of(family: str) -> Any:
    """A tiny random model, the same in every process."""
    how = "eager" if family in EAGER else "sdpa"
    return tiny_model(tiny_config(family, **CHANGES.get(family, {})), attn_implementation=how)


def main(out: str, families: list[str]) -> None:
    from transformers.modeling_utils import AttentionInterface

    honest, calls = AttentionInterface.get_interface, []

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = honest(self, *args, **kwargs)

        def noting(module: Any, query: Any, key: Any, value: Any, *more: Any, **named: Any) -> Any:
            new = query.shape[2]
            calls.append((id(module), *(one[0, :, -new:].numpy().copy() for one in (query, key, value))))
            return function(module, query, key, value, *more, **named)

        return noting

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
    found: dict[str, np.ndarray] = {}
    for family in families:
        model = model_of(family)
        for row, prompt in enumerate(PROMPTS):
            calls.clear()
            written = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            found[f"{family}/{row}/ids"] = written[0].numpy()
            for place, module in enumerate(dict.fromkeys(call[0] for call in calls)):
                for kind, at in (("q", 1), ("k", 2), ("v", 3)):
                    steps = [call[at] for call in calls if call[0] == module]
                    found[f"{family}/{row}/{place}/{kind}"] = np.concatenate(steps, axis=1)
    np.savez(out, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
