"""generate=sample: in vLLM's sampler, the token that our own law draws from vLLM's logits.

vLLM loads `Drawing` by its name (EngineArgs.logits_processors) in each of its workers; nothing else imports this
module, since its class is one of vLLM's. Of a request that brings a `Draws`, the row of logits leaves one token
possible: the one at which the cumulated probabilities reach the number of that document and position
(forward/generation/choosing.py). So a text does not depend on which others share its steps, and where a request is
put back and computed again it goes on with the same tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from sniffer.engine.vllm.draws import DRAWS, Draws


class Drawing(AdapterLogitsProcessor):
    """Draws the next token of each request that asks for it."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Draw | None:
        draws = (params.extra_args or {}).get(DRAWS)
        return None if draws is None else Draw(draws)


class Draw:
    """Of one request: given the tokens that it has written, and the logits of the next, leaves one of them."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def __call__(self, written: list[int], logits: Float[Tensor, " vocabulary"]) -> Float[Tensor, " vocabulary"]:
        token = self._draws.token(len(written), logits.float().cpu().numpy().astype(np.float64))
        only = torch.full_like(logits, -torch.inf)
        only[token] = 0.0
        return only
