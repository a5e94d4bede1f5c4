"""Rows of the very mask that attention was given, as numbers to add."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sniffer.errors import UnsupportedModelError
from sniffer.forward.attention.calls import Call


def mask_rows(
    call: Call, row: int, places: Int[Tensor, " picks"], keys: int, first: int = 0
) -> Float[Tensor, "1 _ picks keys"]:
    """The rows of the mask that attention was given, as numbers to add; causal by position where it was given none.

    Args:
        places: which of the queries, the first of which is at position `first`.

    Raises:
        UnsupportedModelError: the mask is of no kind that is known.
    """
    mask = call.mask
    if mask is None:
        return _causal(call, places + first, keys)
    if not isinstance(mask, Tensor):
        return _block_rows(call, row, places + first, keys)
    if mask.dim() != 4 or mask.shape[2] != call.q.shape[2]:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} is given a mask of shape {tuple(mask.shape)}, of which rows cannot be taken"
        )
    rows = mask[row % mask.shape[0]][None, :, :, :keys].index_select(2, places)
    return _as_numbers(rows)


def _as_numbers(rows: Tensor) -> Tensor:
    if rows.dtype != torch.bool:
        return rows.float()
    return torch.zeros(rows.shape, device=rows.device).masked_fill_(~rows, -math.inf)


def _causal(call: Call, positions: Int[Tensor, " picks"], keys: int) -> Tensor:
    columns = torch.arange(keys, device=positions.device)
    back = positions[:, None] - columns
    seen = back >= 0 if call.causal else torch.ones_like(back, dtype=torch.bool)
    # A mask says all of a window; kernels that are given none are told it as a number.
    window = call.options.get("sliding_window") if "flash" in getattr(call.function, "__name__", "") else None
    if window is not None:
        seen &= back < window
    return _as_numbers(seen[None, None])


def _block_rows(call: Call, row: int, positions: Int[Tensor, " picks"], keys: int) -> Tensor:
    """Of a mask that is a rule for a query and a key, as flex attention has it."""
    rule = getattr(call.mask, "mask_mod", None)
    if rule is None:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} is given a mask of {type(call.mask).__name__}, which is not known"
        )
    columns = torch.arange(keys, device=positions.device)
    number = torch.tensor(row, device=positions.device)
    heads = call.q.shape[1]
    by_key = torch.vmap(rule, in_dims=(None, None, None, 0))
    by_query = torch.vmap(by_key, in_dims=(None, None, 0, None))
    by_head = torch.vmap(by_query, in_dims=(None, 0, None, None))
    allowed = by_head(number, torch.arange(heads, device=positions.device), positions, columns)
    return _as_numbers(allowed[None])
