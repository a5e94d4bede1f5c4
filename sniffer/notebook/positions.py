"""The positions that a call states for its tokens, and their places in the text, which may be others.

Some models have several positions a token: of time, height and width. Those of text are the same; those of an image
are not, and what comes behind an image goes on at the largest of them, so that all of a text from there on is stated
some positions *apart* from its place. Rows are known by their place: a law of sampling counts tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.notebook.call import Call

FARTHEST = 1 << 24
"""No text is as long as this: positions from here on are a mistake."""

MASKED = 4
"""Axes of positions where the first is of places, for masks, and the others turn."""


@dataclass(frozen=True)
class Stated:
    """Where the tokens of a call are in their texts; `apart`, by row, how far from there the next one is stated."""

    places: Int64[np.ndarray, "batch seq"]
    apart: tuple[int, ...]


def stated_by(call: Call, real: Bool[np.ndarray, "batch seq"], apart: Sequence[int] | None = None) -> Stated | None:
    """What a call states; None where it states nothing.

    Args:
        real: which of its tokens are no padding.
        apart: of rows that go on with earlier ones, what was found for these.

    Raises:
        CaptureError: positions are no whole numbers from 0 on, have another shape, or are several for text.
    """
    axes = _axes_of(call.position_ids, real)
    if axes is None:
        return None
    before = np.zeros(len(real), np.int64) if apart is None else np.array(apart, np.int64)
    turning = axes[1:] if len(axes) == MASKED else axes
    several = (turning != turning[0]).any(0) & real
    of_image = np.isin(call.tokens.cpu().numpy(), list(call.images)) if call.images else np.zeros_like(real)
    if (several & ~of_image).any():
        raise CaptureError("this call gives tokens several positions, as for images: only text has one a token")
    places, after = turning[0] - before[:, None], before.copy()
    for row in np.flatnonzero(several.any(1)):
        columns = np.flatnonzero(real[row])
        first = int(turning[:, row, columns[0]].min() - before[row])
        places[row, columns] = first + np.arange(len(columns))
        after[row] = turning[:, row, columns].max() - places[row, columns[-1]]
    if len(axes) == MASKED and (axes[0] != places)[real].any():
        raise CaptureError("this call gives tokens several positions, and other places to its mask: leave them out")
    return Stated(places, tuple(after.tolist()))


def _axes_of(position_ids: Any, real: Bool[np.ndarray, "batch seq"]) -> Int64[np.ndarray, "axes batch seq"] | None:
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
    if real.any() and (axes[:, real].min() < 0 or axes[:, real].max() >= FARTHEST):
        raise CaptureError(f"this call's position_ids reach outside [0, {FARTHEST:,}): count positions from 0")
    return axes
