"""One call of attention, and the same computed step by step for a few of its queries.

No formula of any family is written here. A family computes attention with a function of its own, which it calls
`eager_attention_forward`; that function is called once more, for the picked queries alone, with their rows of the very
mask that attention was given, and a mode of torch looks at what enters its softmax.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sniffer.errors import UnsupportedModelError, first_line
from sniffer.forward.attention.softmax import Softmax, Watch
from sniffer.tap import Attended

EAGER = "eager_attention_forward"
"""What families call the function that computes attention step by step."""

SDPA = "scaled_dot_product_attention"
"""Torch's own, which some families call themselves."""


@dataclass(frozen=True)
class Call:
    """One call of attention, with its arguments by what they mean; tensors are (batch, heads, seq, dim).

    `options` are all other keywords, `returned` is (batch, heads, seq, dim) too.
    """

    module: nn.Module
    function: Callable[..., Any]
    home: str
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    causal: bool
    options: Mapping[str, Any]
    returned: Tensor

    @classmethod
    def of(cls, shown: Attended) -> Call:
        """Reads a call that a tap has shown.

        Raises:
            UnsupportedModelError: it is none of the two shapes that are known.
        """
        if _name(shown.function) == SDPA:
            return cls._of_sdpa(shown)
        return cls._of_interface(shown)

    @classmethod
    def _of_interface(cls, shown: Attended) -> Call:
        names = ("module", "query", "key", "value", "attention_mask")
        said = dict(zip(names, shown.arguments, strict=False)) | shown.keywords
        more = shown.arguments[len(names) :]
        if more or not all(isinstance(said.get(name), Tensor) for name in names[1:4]):
            raise _unknown(shown, "its attention function is called with arguments that are not known")
        module, mask = said.pop("module", shown.module), said.pop("attention_mask", None)
        q, k, v = (said.pop(name) for name in names[1:4])
        said.pop("dropout", None)
        returned = shown.returned[0] if isinstance(shown.returned, tuple) else shown.returned
        causal = said.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        returned = returned.unflatten(-1, (q.shape[1], -1)) if returned.dim() == 3 else returned
        return cls(module, shown.function, shown.home, q, k, v, mask, bool(causal), said, returned.transpose(1, 2))

    @classmethod
    def _of_sdpa(cls, shown: Attended) -> Call:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        said = dict(zip(names, shown.arguments, strict=False)) | shown.keywords
        q, k, v = (said.pop(name) for name in names[:3])
        if any(one.dim() != 4 for one in (q, k, v)):
            raise _unknown(shown, "torch's attention is called with other shapes than (batch, heads, seq, dim)")
        mask, causal = said.pop("attn_mask", None), said.pop("is_causal", False)
        said.pop("dropout_p", None)
        return cls(shown.module, shown.function, shown.home, q, k, v, mask, bool(causal), said, shown.returned)

    @property
    def stepwise(self) -> Callable[..., Any]:
        """The function that computes the same step by step.

        Raises:
            UnsupportedModelError: the family has none.
        """
        if _name(self.function) == SDPA:
            return sdpa_by_steps
        if _name(self.function) == EAGER:
            return self.function
        found = getattr(sys.modules.get(self.home), EAGER, None)
        if found is None:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} has no {EAGER} that its logits could be had from"
            )
        return found


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", ""))


def _unknown(shown: Attended, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(shown.module).__name__}: {why}")


def sdpa_by_steps(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """What torch documents of scaled_dot_product_attention, in steps; for the logits of code that calls it itself."""
    scale, groups = options.get("scale"), query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    weights = torch.softmax(logits if attention_mask is None else logits + attention_mask, -1)
    return weights @ value, weights


class Ungrouped:
    """Stands in for an attention module in a call of its own function: each query head comes with its key head."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def by_steps(
    call: Call,
    q: Float[Tensor, "1 heads picks dim"],
    k: Float[Tensor, "1 key_heads keys dim"],
    mask: Float[Tensor, "1 _ picks keys"],
    *,
    ungrouped: bool,
) -> Float[Tensor, "heads picks columns"]:
    heads, picks, keys = q.shape[1], q.shape[2], k.shape[2]
    module: Any = call.module
    if ungrouped:
        groups = heads // k.shape[1]
        module = Ungrouped(call.module)
        q = q.reshape(1, k.shape[1], groups * picks, q.shape[3])
        shared = mask.shape[1] == 1
        mask = mask.repeat(1, 1, groups, 1) if shared else mask.reshape(1, k.shape[1], groups * picks, keys)
    # Values play no part in logits: none are handed over, so that none are repeated.
    none = k[..., :0]
    seen = Softmax(keys)
    with Watch(seen.look):
        try:
            call.stepwise(module, q, k, none, mask, **call.options)
        except UnsupportedModelError:
            raise
        except Exception as error:  # of upstream code: any
            raise UnsupportedModelError(
                f"{type(call.module).__name__}: its own {EAGER} does not take a few queries alone "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
    if seen.logits is None:
        raise UnsupportedModelError(f"{type(call.module).__name__}: its own {EAGER} has no softmax over keys")
    logits = seen.logits[0].float()
    return logits.reshape(heads, picks, logits.shape[-1])
