"""What a call of a model says: its tokens, masks, positions and cache.

People hand them over by name or by place, to a whole model or to a part of it. What they make of the rows is told in
pieces.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sniffer.errors import CaptureError

Arguments = Mapping[str, Any]
"""The arguments of a call by name, without those that are None."""

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")
PACKED_OTHERWISE = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_table")
"""Arguments that pack documents for some kernels, without a word about positions."""


@dataclass(frozen=True)
class Call:
    """What one call of a backbone says.

    Attributes:
        tokens: the token ids, (batch, seq).
        mask, position_ids, cache, use_cache: as they were given; None where they were not.
        stated: whether the positions are those of the user, and not of a model around the backbone.
        whole: whether it was the outermost model that was given these tokens.
        images: the token ids that stand for images in it; `vectors`: what the backbone is given in place of ids, if so.
        counts: says whether the model, told no positions, gives rows that are padded on the left what they have alone;
            asked where it matters.
    """

    tokens: Tensor
    mask: Any = None
    position_ids: Any = None
    cache: Any = None
    use_cache: Any = None
    stated: bool = False
    whole: bool = False
    images: frozenset[int] = frozenset()
    vectors: Tensor | None = None
    counts: Callable[[], bool] = lambda: False

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]


def arguments(forward: Callable[..., Any], args: Sequence[Any], kwargs: Arguments) -> dict[str, Any]:
    """The arguments of a call by name, whichever way they came; those that are None are left out.

    Those that do not fit the function stay as they were named: the call itself will say what is wrong with them.
    """
    signature = inspect.signature(forward)
    try:
        bound = dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError:
        bound = dict(kwargs)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return {name: value for name, value in bound.items() if value is not None}


def read(inner: Arguments, outer: Arguments | None = None) -> Call:
    """What a call says, from the arguments of the backbone and those of the outermost model around it.

    A model of several parts looks its tokens up itself: the backbone is given vectors, and masks made of the user's.
    Then the outer arguments say which tokens and which mask the user gave.

    Raises:
        CaptureError: there are no token ids for what the backbone is given.
    """
    tokens, vectors = inner.get("input_ids"), inner.get("inputs_embeds")
    theirs = None if outer is None else outer.get("input_ids")
    whole = theirs is not None and (tokens is None or tokens is theirs)
    said = outer if outer is not None and whole else inner
    tokens = theirs if whole else tokens
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        raise CaptureError("this call has no input_ids of shape (batch, seq): sniff needs the tokens")
    if isinstance(vectors, Tensor) and vectors.shape[:2] != tokens.shape:
        raise CaptureError(
            f"this call has input_ids of shape {tuple(tokens.shape)}, of which the model makes vectors for "
            f"{tuple(vectors.shape[:2])} tokens: it cannot be told which is which"
        )
    # Some models take position_ids and leave their layers without: then the proof fails.
    positions = inner.get("position_ids"), said.get("position_ids"), inner.get("cache_position")
    for name in PACKED_OTHERWISE:
        if inner.get(name) is not None:
            raise CaptureError(f"this call packs documents by {name}: give position_ids alone, or a document a row")
    cache = next((inner[name] for name in CACHES if inner.get(name) is not None), None)
    return Call(
        tokens=tokens.detach(),
        mask=_without_room(said.get("attention_mask"), cache, tokens.shape[1]),
        position_ids=next((found for found in positions if found is not None), None),
        cache=cache,
        use_cache=inner.get("use_cache"),
        stated=said.get("position_ids") is not None,
        whole=whole,
        vectors=vectors if isinstance(vectors, Tensor) else None,
    )


def _without_room(mask: Any, cache: Any, seq: int) -> Any:
    """A mask (batch, columns) that goes on, with zeros, over all that a static cache has room for, up to this call.

    So bloom's `generate` makes them, since its positions follow from the mask.
    """
    length = getattr(cache, "get_max_length", getattr(cache, "get_max_cache_shape", None))
    if not isinstance(mask, Tensor) or mask.dim() != 2 or length is None or mask.shape[1] != length():
        return mask
    columns = earlier_tokens(cache) + seq
    return mask if mask[:, columns:].any() else mask[:, :columns]


def earlier_tokens(cache: Any) -> int:
    """How many tokens a cache holds already; 0 without one.

    Raises:
        CaptureError: it does not say.
    """
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except Exception as error:  # of upstream code: any
        raise CaptureError(
            f"this call brings a cache ({type(cache).__name__}) that does not say how many tokens it holds: give one "
            "of transformers' caches, or none"
        ) from error
