"""Masks of a call: which of its tokens are no padding, whatever shape that is said in.

A call with a cache has a mask over the cache's columns too. What was known of those must be what the mask says; a
sliding layer's mask begins later, and ends with the call's last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sniffer.errors import CaptureError

SHUT = -1e4
"""What a mask of numbers adds, at most, to a score that shall not count."""

PLAIN = "give one of shape (batch, seq), 1 for a token and 0 for padding"

Real = Bool[np.ndarray, "batch columns"]


def real_tokens(mask: Any, shape: tuple[int, int], earlier: Real | None = None) -> Bool[np.ndarray, "batch seq"]:
    """Which tokens are no padding, by a plain mask: none, (batch, seq), (batch, 1, seq, keys), or several by name.

    Args:
        shape: (batch, seq) of the call.
        earlier: which columns of its cache are no padding; None where it has none.

    Raises:
        CaptureError: the mask is none of these, a token sees others than those just before it, or what it says of
            earlier columns is not so.
    """
    known = np.ones((shape[0], 0), dtype=bool) if earlier is None else earlier
    if mask is None:
        if not known.all():
            raise CaptureError(
                "this call goes on with rows that were padded, and has no attention_mask: give one of shape "
                f"({shape[0]}, {known.shape[1] + shape[1]}), 1 for a token and 0 for padding"
            )
        return np.ones(shape, dtype=bool)
    if isinstance(mask, Mapping):
        named = [real_tokens(one, shape, earlier) for one in mask.values() if one is not None]
        if any((one != named[0]).any() for one in named):
            raise CaptureError(f"the attention masks of this call disagree on what is padding: {PLAIN}")
        return named[0] if named else real_tokens(None, shape, earlier)
    if isinstance(mask, Tensor) and mask.shape == (shape[0], known.shape[1] + shape[1]):
        return _by_token(mask, known)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return _by_pair(mask, shape, known)
    found = f"has the shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
    behind = f" behind {known.shape[1]} in its cache" if known.shape[1] else ""
    raise CaptureError(f"this call's attention_mask {found}, for input_ids of shape {shape}{behind}: {PLAIN}")


def _by_token(mask: Tensor, earlier: Real) -> Bool[np.ndarray, "batch seq"]:
    if not ((mask == 0) | (mask == 1)).all():
        raise CaptureError(f"this call's attention_mask has other values than 0 and 1: {PLAIN}")
    real = mask.detach().cpu().numpy().astype(bool)
    held = earlier.shape[1]
    if (real[:, :held] != earlier).any():
        raise CaptureError("this call's attention_mask says otherwise of tokens in its cache than earlier calls did")
    return real[:, held:]


def _by_pair(mask: Tensor, shape: tuple[int, int], earlier: Real) -> Bool[np.ndarray, "batch seq"]:
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
    rows = seen[:, 0].detach().expand(batch, -1, -1) if earlier.size else seen[:, 0].detach()
    real = [_checked(one, torch.from_numpy(known)) for one, known in zip(rows, earlier, strict=False)]
    return torch.stack(real).expand(batch, seq).cpu().numpy()


def _checked(seen: Bool[Tensor, "seq keys"], earlier: Bool[Tensor, " held"]) -> Bool[Tensor, " seq"]:
    """Which tokens of a row see themselves, if nobody sees padding, and they see those before without a gap."""
    seq, keys = seen.shape
    held = len(earlier)
    # A mask is of all columns, with room behind them in a static cache; or of the last ones, in a sliding layer.
    first = max(0, held + seq - keys)
    columns = first + torch.arange(keys, device=seen.device)
    own = held + torch.arange(seq, device=seen.device)
    real = seen[torch.arange(seq, device=seen.device), own - first]
    known = torch.cat([earlier.to(seen.device), real])
    token = (columns < held + seq) & known[columns.clamp(max=held + seq - 1)]
    before = columns[None] <= own[:, None]
    ours = seen & real[:, None]
    # Who sees a token sees the next one too, up to itself; how far back does not matter, as in a window.
    gap = ours[:, :-1] & ~ours[:, 1:] & token[1:] & before[:, 1:]
    if (ours & ~before).any() or (seen & ~token).any() or gap.any():
        raise CaptureError(f"this call's attention_mask lets tokens see others than those just before them: {PLAIN}")
    return real
