"""The reflection that puts a direction first."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64


def householder(drift: Float64[np.ndarray, "heads dim"]) -> Float64[np.ndarray, "heads dim dim"]:
    """The reflection that takes each drift to the first axis, I - 2 u u' / |u|^2 with u = drift / |drift| - e1.

    It must be this one: the reflection to the other end of the axis has another basis across the drift, and so another
    diagonal.
    """
    norms = np.linalg.norm(drift, axis=1, keepdims=True)
    unit = np.divide(drift, norms, out=np.zeros_like(drift), where=norms > 0)
    u = unit.copy()
    # unit_1 - 1 where both are nearly equal: of a unit vector, 1 - x^2 is what the others have.
    ahead = unit[:, 0] > 0
    others = (unit[:, 1:] ** 2).sum(1)
    u[:, 0] = np.where(ahead, -others / (1 + np.where(ahead, unit[:, 0], 0)), unit[:, 0] - 1)
    length = (u**2).sum(1)[:, None, None]
    outer = u[:, :, None] * u[:, None, :]
    eye = np.eye(drift.shape[1])
    # Along the first axis already, or nowhere at all: nothing to turn.
    still = (length < 1e-30) | (norms[:, :, None] == 0)
    return np.where(still, eye, eye - 2 * outer / np.where(still, 1, length))
