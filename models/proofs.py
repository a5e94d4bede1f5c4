"""What a call may say of its rows, and how a model proves that it does as it is told.

A run gives a model token ids and nothing else. In a notebook a call may also state positions, pack documents into one
row, or pad on the left. Whether that is heard depends on the family: one ignores position_ids, another lets a packed
document see the one before it. Each claim is therefore tried on the model itself, with a few tokens.

A proof takes a way to show what the model attends with, and the probe's ids; it says why the claim does not
hold, and nothing where it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from sniffer.tap import Seen
from sniffer.types import KIND, KINDS

SHIFT = 3
TOLERANCE = {torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""How far vectors may be apart, over their spread, that are equal but for rounding; 1e-3 for other dtypes."""

Ids = Int[Tensor, "batch seq"]


class Show(Protocol):
    """What the layers show in a call with these ids, one row, and with what is said beside them."""

    def __call__(self, ids: Tensor, *, split: int = 0, **said: Tensor) -> list[Seen]:
        """With a `split`, the tokens before it go first, the others after them with the cache that this leaves; then
        all kinds are shown, of the others alone."""
        ...


def why_not_stated(show: Show, ids: Ids) -> str:
    """Positions that count from 0 are those that a model has when it is told none."""
    columns = torch.arange(ids.shape[1], device=ids.device)[None]
    same = alike(show(ids[:1]), show(ids[:1], position_ids=columns))
    return "" if same else "position_ids that count from 0 do not give what none give"


def why_not_positions(show: Show, ids: Ids) -> str:
    """Vectors follow position_ids: one and the same token everywhere, told to be SHIFT positions further on."""
    same = ids[:1, :1].expand(1, ids.shape[1])
    columns = torch.arange(same.shape[1], device=ids.device)[None]
    if reason := why_not_stated(show, same):
        return reason
    plain, moved = show(same, position_ids=columns), show(same, position_ids=columns + SHIFT)
    telling = [(a, b) for a, b in zip(plain, moved, strict=True) if not alike([cut(a, SHIFT)], [cut(a, 0, -SHIFT)])]
    if not telling:
        return "its vectors show no positions"
    # In later layers, learned positions have been mixed by attention.
    before, after = telling[0]
    if not alike([cut(before, SHIFT)], [cut(after, 0, -SHIFT)]):
        return "its vectors do not follow position_ids"
    return ""


def why_not_packed(show: Show, ids: Ids) -> str:
    """A document whose positions begin anew does not see the one before it in its row."""
    first, last = ids[:1], ids[1:2]
    n = ids.shape[1]
    twice = torch.arange(n, device=ids.device).repeat(2)[None]
    packed, changed = (show(torch.cat([one, last], 1), position_ids=twice) for one in (first, first.flip(1)))
    alone = show(last)
    same = alike([cut(one, n) for one in packed], [cut(one, n) for one in changed])
    return "" if same and alike([cut(one, n) for one in packed], alone) else "documents of a row see each other"


def why_not_left(show: Show, ids: Ids) -> str:
    """What a row is padded with on the left has no say, where position_ids count from its first token."""
    mask, positions = _padded(ids)
    return _why_not_left(show, ids, attention_mask=mask, position_ids=positions)


def why_not_counted(show: Show, ids: Ids) -> str:
    """The same where none are given: the model counts from the first token itself, or has no positions to count."""
    return _why_not_left(show, ids, attention_mask=_padded(ids)[0])


def _why_not_left(show: Show, ids: Ids, **said: Tensor) -> str:
    last = ids[1:2]
    pads = (ids[:1, :SHIFT], ids[:1, SHIFT : 2 * SHIFT])
    padded, changed = (show(torch.cat([pad, last], 1), split=0, **said) for pad in pads)
    alone = show(last)
    same = alike([cut(one, SHIFT) for one in padded], [cut(one, SHIFT) for one in changed])
    return "" if same and alike([cut(one, SHIFT) for one in padded], alone) else "its vectors depend on the padding"


def why_not_shifted(show: Show, ids: Ids) -> str:
    """Without position_ids, a row that is padded on the left has the positions of its columns."""
    last, n = ids[1:2], ids.shape[1]
    mask, _ = _padded(ids)
    padded = show(torch.cat([ids[:1, :SHIFT], last], 1), attention_mask=mask)
    alone = show(last, position_ids=torch.arange(SHIFT, SHIFT + n, device=ids.device)[None])
    same = alike([cut(one, SHIFT) for one in padded], alone)
    return "" if same else "its positions there cannot be told"


def why_not_cached(show: Show, ids: Ids) -> str:
    """Tokens that go on with a cache have the vectors that they have in one forward over all."""
    return _why_not_cached(show, ids[1:2])


def why_not_cached_stated(show: Show, ids: Ids) -> str:
    """The same, where position_ids say where they are."""
    return _why_not_cached(show, ids[1:2], position_ids=torch.arange(ids.shape[1], device=ids.device)[None])


def why_not_cached_left(show: Show, ids: Ids) -> str:
    """The same, of a row that is padded on the left."""
    mask, positions = _padded(ids)
    return _why_not_cached(show, ids[1:2], ids[:1, :SHIFT], attention_mask=mask, position_ids=positions)


def why_not_cached_counted(show: Show, ids: Ids) -> str:
    """The same, of one that has no position_ids, and is counted from its first token."""
    return _why_not_cached(show, ids[1:2], ids[:1, :SHIFT], attention_mask=_padded(ids)[0])


def _padded(ids: Ids) -> tuple[Tensor, Tensor]:
    """The mask of a row with SHIFT tokens of padding on the left, and positions that count behind them."""
    mask = torch.ones(1, SHIFT + ids.shape[1], dtype=torch.long, device=ids.device)
    mask[:, :SHIFT] = 0
    return mask, (mask.cumsum(1) - 1).clamp(min=0)


def _why_not_cached(show: Show, last: Tensor, pad: Tensor | None = None, **said: Tensor) -> str:
    n = last.shape[1]
    padded = last if pad is None else torch.cat([pad, last], 1)
    first = padded.shape[1] - n // 2
    events = show(padded, split=first, **said)
    whole = [cut(one, first - (padded.shape[1] - n)) for one in show(last)]
    if len(events) != len(whole):
        return "a call with a cache shows other layers than one without"
    return "" if alike(events, whole, KINDS) else "what goes on with a cache is not what one forward over all gives"


CLAIMS: dict[str, Callable[[Show, Ids], str]] = {
    "stated": why_not_stated,
    "positions": why_not_positions,
    "packed": why_not_packed,
    "left": why_not_left,
    "counted": why_not_counted,
    "shifted": why_not_shifted,
    "cached": why_not_cached,
    "cached_stated": why_not_cached_stated,
    "cached_left": why_not_cached_left,
    "cached_counted": why_not_cached_counted,
}


def cut(event: Seen, first: int, last: int | None = None) -> Seen:
    """An event with the columns from `first` up to `last` alone."""
    shown = {kind: KIND[kind].shown(event) for kind in KINDS}
    return event._replace(**{kind: states[:, :, first:last] for kind, states in shown.items() if states is not None})


def alike(one: Sequence[Seen], other: Sequence[Seen], kinds: Sequence[str] = ("q", "k")) -> bool:
    """Whether what all layers show of some kinds agrees, up to rounding."""
    pairs = [(KIND[kind].shown(a), KIND[kind].shown(b)) for a, b in zip(one, other, strict=True) for kind in kinds]
    return all(apart(a, b) <= TOLERANCE.get(a.dtype, 1e-3) for a, b in pairs if a is not None and b is not None)


def apart(one: Tensor, other: Tensor) -> float:
    """How far vectors (batch, heads, seq, dim) are apart, over their spread about the mean of their head.

    Over their spread, not their size: a bias that all tokens share would hide any difference.
    """
    one, other = one.float(), other.float()
    spread = (one - one.mean(2, keepdim=True)).norm()
    return float((one - other).norm() / torch.maximum(spread, 1e-2 * one.norm()).clamp(min=1e-30))
