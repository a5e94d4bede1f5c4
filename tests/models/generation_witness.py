"""What attention is given while transformers itself generates: run as a process of its own, which knows nothing of us.

    python -m tests.models.generation_witness OUT.npz [CACHE:]FAMILY ...

The functions that attend are wrapped, one prompt at a time is gone on with, without padding, and what each layer was
given at each step is written down. CACHE is one of CACHES; where numbers depend on what shares a batch, prompts are
side by side. The vectors of a token's own key and value are those of the last column that its query sees, by the mask.
Of some families with a CACHE the weights are computed too, by what attention was given.
Of families that attend in a layer's own code (INLINE), products of tensors are looked at: of queries with keys, and of
the weights that follow with values.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import cache_utils

from tests.tiny_families import tiny_config, tiny_model

PROMPTS = ([30, 41, 52, 63, 74, 85, 96, 107, 118, 129, 31, 42], [33, 44, 55], [21, 22, 23, 24, 25, 26, 27])
NEW = 14
WINDOW = 6
INLINE = ("bloom", "mpt", "gpt_neo", "xglm", "gpt_neox_japanese", "rembert", "megatron-bert", "big_bird")
EAGER = ("gemma2", "gpt_oss", "phi3", *INLINE)
SLIDING = (
    *("mistral", "gemma2", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4_text", "gpt_oss", "cohere2", "olmo3"),
    "exaone4",
)
CHANGES: dict[str, dict[str, Any]] = dict.fromkeys(SLIDING, {"sliding_window": WINDOW})
CHANGES["llama4_text"] = {"attention_chunk_size": 8}
CHANGES["gemma"] = {"head_dim": 64}  # the numbers that quanto and hqq round together

CACHES: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "ones": {"prefill_chunk_size": 1},
    "sevens": {"prefill_chunk_size": 7},
    "all": {"prefill_chunk_size": 99},
    "static-sevens": {"cache_implementation": "static", "prefill_chunk_size": 7},
    "fp8": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
    "fp8-sevens": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}, "prefill_chunk_size": 7},
    "quanto": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    "hqq-sevens": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}, "prefill_chunk_size": 7},
}
"""What transformers is asked for."""
FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")
"""Whether this transformers has such a cache."""
PACKAGED = ("quanto", "hqq-sevens")
"""Those that take a package of their own (tests/quantized_caches.py)."""
TOGETHER = ("fp8", "fp8-sevens", *PACKAGED)
"""Numbers of a whole batch may be rounded together."""
WEIGHED = ("llama", "mistral", "qwen3", "deepseek_v3", "gemma")
"""Whose weights are a softmax of scaled products."""


def model_of(family: str) -> Any:
    """A tiny random model, the same in every process."""
    how = "eager" if family in EAGER else "sdpa"
    return tiny_model(tiny_config(family, **CHANGES.get(family, {})), attn_implementation=how)


def own_columns(mask: torch.Tensor | None, new: int, columns: int) -> torch.Tensor:
    """The column of each new token's own key, (batch or 1, new)."""
    if mask is None:  # then one query sees all keys, and of several the first sees the first alone: torch's is_causal
        return torch.arange(new)[None] if new > 1 else torch.tensor([[columns - 1]])
    seen = mask[:, 0, :, :columns]
    seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    return columns - 1 - seen.flip(-1).int().argmax(-1)


def weights_of(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """(batch, heads, new, columns)."""
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool)
        mask = mask.tril() if len(mask) > 1 else mask
    mask = mask[..., : key.shape[2]]
    return (scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask).softmax(-1)


def side_by_side(calls: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Weights of all calls (batch, heads, tokens, tokens), given those of each and the columns of its own keys."""
    batch, heads = calls[0][0].shape[:2]
    total = sum(weights.shape[2] for weights, _ in calls)
    found, query = np.zeros((batch, heads, total, total), np.float32), 0
    for weights, own in calls:
        for place in range(weights.shape[2]):
            for row in range(batch):
                first = own[row, place] - query  # the column of the first token
                columns = np.arange(max(0, first), own[row, place] + 1)
                found[row, :, query, columns - first] = weights[row, :, place, columns]
            query += 1
    return found


class Products(TorchFunctionMode):
    """Notes the queries, new keys and new values (1, heads, new, dim) of each attention, in the order of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[np.ndarray, ...]] = []
        self._first: tuple[Any, Any] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__ in ("matmul", "bmm", "baddbmm", "__matmul__"):
            told = [*args, *(kwargs or {}).values()]
            one, other = [each for each in told if isinstance(each, torch.Tensor)][-2:]
            if one.dim() >= 3 and other.dim() >= 3:
                self._note(one, other)
        return result

    def _note(self, one: torch.Tensor, other: torch.Tensor) -> None:
        if self._first is not None and one.shape[-2:] == (self._first[0].shape[-2], self._first[1].shape[-1]):
            (q, k), new = self._first, one.shape[-2]
            three = q, k.transpose(-1, -2), other
            self.found.append(
                tuple(each.reshape(-1, *each.shape[-2:])[None, :, -new:].numpy().copy() for each in three)
            )
            self._first = None
        else:
            self._first = one, other


def by_products(model: Any, ids: torch.Tensor, **how: Any) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    """What a model writes, and what each of its layers attends with at each step: its number, q, k, v."""
    with Products() as products:
        written = model.generate(ids, **how)
    layers = model.config.num_hidden_layers
    assert len(products.found) == layers * NEW
    return written, [(number % layers, *three) for number, three in enumerate(products.found)]


def main(out: str, wanted: list[str]) -> None:
    from transformers.modeling_utils import AttentionInterface

    honest, calls, weighed = AttentionInterface.get_interface, [], False

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = honest(self, *args, **kwargs)

        def noting(module: Any, query: Any, key: Any, value: Any, *more: Any, **named: Any) -> Any:
            mask = more[0] if more else named.get("attention_mask")
            own = own_columns(mask, query.shape[2], key.shape[2]).expand(len(query), -1)
            ours = [
                one.gather(2, own[:, None, :, None].expand(-1, one.shape[1], -1, one.shape[3])) for one in (key, value)
            ]
            noted = [one.numpy().copy() for one in (query, *ours)]
            if weighed:
                noted += [weights_of(query, key, mask, named["scaling"]).numpy(), own.numpy()]
            calls.append((id(module), *noted))
            return function(module, query, key, value, *more, **named)

        return noting

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
    found: dict[str, np.ndarray] = {}
    for name in wanted:
        cache, _, family = name.rpartition(":")
        model, weighed = model_of(family), cache != "" and family in WEIGHED
        every = range(len(PROMPTS))
        for rows in [every] if cache in TOGETHER else [[row] for row in every]:
            calls.clear()
            seq = max(len(PROMPTS[row]) for row in rows)
            pads = [seq - len(PROMPTS[row]) for row in rows]
            ids = torch.tensor([[0] * pad + PROMPTS[row] for row, pad in zip(rows, pads, strict=True)])
            how = {
                "attention_mask": torch.tensor([[0] * pad + [1] * (seq - pad) for pad in pads]),
                **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0},
                "use_cache": True,  # which mpt's config says it does not
                **CACHES.get(cache, {}),
            }
            if family in INLINE:
                written, calls[:] = by_products(model, ids, **how)
            else:
                written = model.generate(ids, **how)
            for place, module in enumerate(dict.fromkeys(call[0] for call in calls)):
                for kind, at in (("q", 1), ("k", 2), ("v", 3)):
                    states = np.concatenate([call[at] for call in calls if call[0] == module], axis=2)
                    for row, one, pad in zip(rows, states, pads, strict=True):
                        found[f"{name}/{row}/{place}/{kind}"] = one[:, pad:]
                if weighed:
                    weights = side_by_side([call[4:] for call in calls if call[0] == module])
                    for row, one, pad in zip(rows, weights, pads, strict=True):
                        found[f"{name}/{row}/{place}/weights"] = one[:, pad:, pad:]
            for row, ids, pad in zip(rows, written, pads, strict=True):
                found[f"{name}/{row}/ids"] = ids[pad:].numpy()
    np.savez(out, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
