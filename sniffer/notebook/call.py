"""What a call of a model says about its rows: which documents they hold, and at which positions.

People hand over token ids, masks, positions and caches by name or by place, to a whole model or to a part of it. Here
the arguments of such a call become *pieces*: stretches of a row that hold tokens of one document, with consecutive
positions. What is not plain is refused in one line; nothing is guessed.

Some of what a call says is only as good as the model that hears it: `claims` names it, and the model has to prove that
it does as it is told (models/proofs.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sniffer.errors import CaptureError

Arguments = Mapping[str, Any]
"""The arguments of a call by name, without those that are None."""

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")
PACKED_OTHERWISE = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_table")
"""Arguments that pack documents for some kernels, without a word about positions."""

FARTHEST = 1 << 24
"""No text is as long as this: positions from here on are a mistake."""

SHUT = -1e4
"""What a mask of numbers adds, at most, to a score that shall not count."""

PLAIN = "give one of shape (batch, seq), 1 for a token and 0 for padding"


@dataclass(frozen=True)
class Call:
    """What one call of a backbone says.

    Attributes:
        tokens: the token ids, (batch, seq).
        mask, position_ids, cache, use_cache: as they were given; None where they were not.
        stated: whether the positions are those of the user, and not of a model around the backbone.
        whole: whether it was the outermost model that was given these tokens.
    """

    tokens: Tensor
    mask: Any = None
    position_ids: Any = None
    cache: Any = None
    use_cache: Any = None
    stated: bool = False
    whole: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]


@dataclass(frozen=True)
class Piece:
    """Tokens of one document that lie side by side in a row of a call, at consecutive positions."""

    row: int
    first_column: int
    first_position: int
    n_tokens: int


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
    return Call(
        tokens=tokens.detach(),
        mask=said.get("attention_mask"),
        position_ids=next((found for found in positions if found is not None), None),
        cache=next((inner[name] for name in CACHES if inner.get(name) is not None), None),
        use_cache=inner.get("use_cache"),
        stated=said.get("position_ids") is not None,
        whole=whole,
    )


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


def pieces_of(call: Call) -> tuple[Piece, ...]:
    """The pieces of a call's rows, in order; a row of padding alone is one empty piece.

    Raises:
        CaptureError: padding lies inside a row, positions jump, or the mask is no plain one.
    """
    real = real_tokens(call.mask, call.shape)
    positions = positions_of(call.position_ids, real)
    return tuple(
        piece
        for row, tokens in enumerate(real)
        for piece in _pieces(row, np.flatnonzero(tokens), None if positions is None else positions[row])
    )


def claims(call: Call, pieces: Sequence[Piece]) -> dict[str, tuple[str, str]]:
    """What the model has to prove before these pieces are right; with what a message says of the call, and advises.

    Raises:
        CaptureError: documents are packed in a way that lets them see each other.
    """
    starts = {piece.row: piece for piece in reversed(pieces)}
    found = {}
    if len(starts) < len(pieces):
        if call.mask is not None or call.cache is not None:
            what = "an attention_mask" if call.mask is not None else "a cache"
            raise CaptureError(
                f"positions begin anew within a row, and beside {what} the documents there see each other: "
                "give position_ids and use_cache=False without it, or a document a row"
            )
        found["packed"] = ("has several documents in a row", "pass use_cache=False, or a document a row")
    if any(piece.first_column for piece in starts.values()):
        found["left"] = ("is padded on the left", "set tokenizer.padding_side = 'right'")
    if any(piece.first_position for piece in starts.values()):
        found["positions"] = ("has positions that do not begin at 0", "leave position_ids out")
    if call.stated and not found:
        found["stated"] = ("has position_ids", "leave them out")
    return found


def real_tokens(mask: Any, shape: tuple[int, int]) -> Bool[np.ndarray, "batch seq"]:
    """Which tokens are no padding, by a plain mask: none, (batch, seq), (batch, 1, seq, keys), or several by name.

    Raises:
        CaptureError: it is none of these, or a token sees others than those just before it.
    """
    if mask is None:
        return np.ones(shape, dtype=bool)
    if isinstance(mask, Mapping):
        named = [real_tokens(one, shape) for one in mask.values() if one is not None]
        if any((one != named[0]).any() for one in named):
            raise CaptureError(f"the attention masks of this call disagree on what is padding: {PLAIN}")
        return named[0] if named else real_tokens(None, shape)
    if isinstance(mask, Tensor) and mask.shape == shape:
        return _by_token(mask)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return _by_pair(mask, shape)
    found = f"has the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
    raise CaptureError(f"this call's attention_mask {found}, for input_ids of shape {shape}: {PLAIN}")


def positions_of(position_ids: Any, real: Bool[np.ndarray, "batch seq"]) -> Int64[np.ndarray, "batch seq"] | None:
    """The positions that a call states; None where it states none.

    Some models have several positions a token, (axes, batch, seq), which are the same for text.

    Raises:
        CaptureError: they are no whole numbers from 0 on, have another shape, or differ from axis to axis.
    """
    if position_ids is None:
        return None
    kind = position_ids.dtype if isinstance(position_ids, Tensor) else torch.bool
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise CaptureError("this call's position_ids are no tensor of whole numbers: give that, or leave them out")
    stated = position_ids.detach().cpu().numpy().astype(np.int64)
    try:
        axes = np.broadcast_to(stated, (*stated.shape[:-2], *real.shape)).reshape(-1, *real.shape)
    except ValueError:
        raise CaptureError(
            f"this call's position_ids have the shape {stated.shape}, for input_ids of shape {real.shape}"
        ) from None
    if ((axes != axes[0]) & real).any():
        raise CaptureError("this call gives tokens several positions, as for images: only text has one a token")
    if real.any() and (axes[0][real].min() < 0 or axes[0][real].max() >= FARTHEST):
        raise CaptureError(f"this call's position_ids reach outside [0, {FARTHEST:,}): count positions from 0")
    return axes[0]


def _pieces(row: int, columns: Int64[np.ndarray, " _"], positions: np.ndarray | None) -> Iterator[Piece]:
    """The pieces of a row: its columns without padding, cut where positions begin anew."""
    if not len(columns):
        yield Piece(row, 0, 0, 0)
        return
    start, n = int(columns[0]), len(columns)
    if columns[-1] - start + 1 != n:
        raise CaptureError(f"row {row} of this call has padding between its tokens: pad on the right")
    if positions is None:
        if start:
            raise CaptureError(
                "this call is padded on the left, which shifts positions: set tokenizer.padding_side = 'right', or "
                "give position_ids that count from the first token"
            )
        yield Piece(row, 0, 0, n)
        return
    stated = positions[columns]
    cuts = np.flatnonzero(np.diff(stated) != 1) + 1
    for cut in cuts[stated[cuts] != 0]:
        raise CaptureError(
            f"position_ids go from {stated[cut - 1]} to {stated[cut]} in row {row} of this call: they must count on, "
            "or begin anew at 0"
        )
    for begin, end in zip([0, *cuts], [*cuts, n], strict=True):
        yield Piece(row, start + int(begin), int(stated[begin]), int(end - begin))


def _by_token(mask: Tensor) -> Bool[np.ndarray, "batch seq"]:
    if not ((mask == 0) | (mask == 1)).all():
        raise CaptureError(f"this call's attention_mask has other values than 0 and 1: {PLAIN}")
    return mask.detach().cpu().numpy().astype(bool)


def _by_pair(mask: Tensor, shape: tuple[int, int]) -> Bool[np.ndarray, "batch seq"]:
    """Padding by a mask that says of each token which keys it sees; of padding, which is whatever sees not itself."""
    batch, seq = shape
    if mask.shape[0] not in (1, batch) or mask.shape[2] != seq or mask.shape[3] < seq:
        raise CaptureError(f"this call's attention_mask has the shape {tuple(mask.shape)}, for {shape}: {PLAIN}")
    if mask.is_floating_point():
        seen = mask == 0
        plain = bool((seen | (mask <= SHUT)).all())
    else:
        seen, plain = mask, mask.dtype == torch.bool
    if not plain or not (seen == seen[:, :1]).all():
        raise CaptureError(f"this call's attention_mask adds to scores, or differs from head to head: {PLAIN}")
    real = [_checked(one) for one in seen[:, 0].detach()]
    return torch.stack(real).expand(batch, seq).cpu().numpy()


def _checked(seen: Tensor) -> Tensor:
    """Which tokens of a row see themselves, if nobody sees the others, and they see those before without a gap."""
    seq = seen.shape[0]
    real = seen.diagonal()
    ours = seen & real[:, None]
    before = torch.ones(seq, seq, dtype=torch.bool, device=seen.device).tril(-1)
    # Who sees a token sees the next one too, up to itself; how far back does not matter, as in a window.
    gap = ours[:, : seq - 1] & ~ours[:, 1:seq] & real[1:] & before[:, : seq - 1]
    if ours.triu(1).any() or ours[:, seq:].any() or (seen[:, :seq] & ~real).any() or gap.any():
        raise CaptureError(f"this call's attention_mask lets tokens see others than those just before them: {PLAIN}")
    return real
