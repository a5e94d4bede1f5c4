"""One text of a step of a generation, or of any other call: its queries, with keys where their positions are.

In a step keys come from a cache. Of a shorter text than its neighbours the first ones are padding, and a cache of a
sliding window has the last ones only; the newest are the last, but in a static cache, which has room behind them. Here
padding is left out, and keys that are gone stand as zeros that nobody may see.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sniffer.errors import UnsupportedModelError
from sniffer.forward.attention.calls import Call


def text_of(call: Call, row: int, first: int, queries: int, last: int | None = None, keys: int | None = None) -> Call:
    """The call as it is for one text alone.

    Args:
        row: of the text.
        first: the position of its first query in this step.
        queries: how many it has.
        last: the column behind its last query; None where that is the row's last one.
        keys: the column behind the key of that one's token; None where it is the last one.

    Raises:
        UnsupportedModelError: the mask is of a kind that cannot be cut.
    """
    call = _until(call, last, keys)
    gone = first + queries - call.k.shape[2]
    q, returned = (one[row : row + 1, :, -queries:] for one in (call.q, call.returned))
    k, v = (_moved(one[row : row + 1], gone, 0.0) for one in (call.k, call.v))
    return replace(call, q=q, k=k, v=v, mask=_mask_of(call, row, first, queries, gone), returned=returned)


def _until(call: Call, last: int | None, keys: int | None) -> Call:
    """Without the queries from one column on, and the keys from another."""
    last, keys = call.q.shape[2] if last is None else last, call.k.shape[2] if keys is None else keys
    if (last, keys) == (call.q.shape[2], call.k.shape[2]):
        return call
    mask = call.mask
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == call.q.shape[2]:
        mask = mask[:, :, :last]
    q, returned, k, v = call.q[:, :, :last], call.returned[:, :, :last], call.k[:, :, :keys], call.v[:, :, :keys]
    return replace(call, q=q, k=k, v=v, mask=mask, returned=returned)


def _mask_of(call: Call, row: int, first: int, queries: int, gone: int) -> Tensor | None:
    mask = call.mask
    if mask is None:
        # By position, but for keys that are gone.
        if gone <= 0:
            return None
        device = call.q.device
        places, columns = (
            torch.arange(first, first + queries, device=device),
            torch.arange(first + queries, device=device),
        )
        return ((columns <= places[:, None]) & (columns >= gone))[None, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != call.q.shape[2]:
        raise UnsupportedModelError(f"{type(call.module).__name__} is given a mask that steps cannot be taken of")
    row %= mask.shape[0]
    cut = mask[row : row + 1, :, -queries:, : call.k.shape[2]]
    nothing = False if mask.dtype == torch.bool else -torch.inf
    return _moved(cut.transpose(2, 3), gone, nothing).transpose(2, 3)


def _moved(one: Tensor, gone: int, nothing: float | bool) -> Tensor:
    """Along axis 2: without what is before position 0, or with `nothing` in the place of what is gone."""
    return one[:, :, -gone:] if gone <= 0 else pad(one, (0, 0, gone, 0), value=nothing)
