"""Statistics of attention of one family, compared with the weights that it returns when it is asked for them.

The weights come from a process that never installed the hook, and are computed step by step (`output_attentions`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sniffer.models.loaded import LoadedBackbone
from torch import Tensor

from sniffer.errors import UnsupportedModelError
from tests.helpers_attention import batch_of, captured, differences, from_weights

EXACT, USUAL = 1e-5, 4.0
"""The largest difference, where logits are no larger than usual: two forwards differ by rounding, and what it makes of
weights grows with the logits. Gemma 4, whose queries are not scaled, has logits of 80 here."""


def statistics_of(backbone: LoadedBackbone, ids: Tensor) -> dict[str, Any]:
    """All statistics at every position of every layer, or why there are none."""
    try:
        return {"reason": "", "layers": list(captured(backbone, batch_of(ids)).values())}
    except UnsupportedModelError as error:
        return {"reason": str(error), "layers": []}


def compared(module: Any, ids: Tensor, layers: list[dict[str, np.ndarray]]) -> str:
    """What of the statistics differs from what follows from the weights that the module returns, step by step."""
    weights = returned_weights(module, ids)
    if len(weights) != len(layers):
        return f"weights of {len(weights)} layers are returned, of {len(layers)}"
    rows, tokens = ids.shape
    for number, (one, found) in enumerate(zip(weights, layers, strict=True)):
        for row in range(rows):
            here = {name: values[row * tokens : (row + 1) * tokens] for name, values in found.items()}
            wanted = from_weights(one[row])
            allowed = EXACT * max(1.0, float(np.abs(here["max_logit"]).max()) / USUAL)
            wrong = {name: far for name, far in differences(here, wanted).items() if not far <= allowed}
            # The largest logit is that of the largest weight: exp(logit - log sum) gives it back.
            back = np.abs(np.exp(here["max_logit"] - here["lse"]) - wanted["mass"].max(-1)).max()
            if wrong or not back <= allowed:
                return f"attention {number}: {wrong or {'lse': float(back)}}"
    return ""


def returned_weights(module: Any, ids: Tensor) -> list[np.ndarray]:
    """(rows, heads, tokens, tokens) of each layer that returns any."""
    with torch.inference_mode():
        answer = module(input_ids=ids, output_attentions=True)
    found = [one for one in getattr(answer, "attentions", None) or () if isinstance(one, Tensor)]
    tokens = ids.shape[1]
    return [one.float().numpy() for one in found if one.dim() == 4 and one.shape[-2:] == (tokens, tokens)]
